"""Computes the package list: one kept by hand would silently drop new sub-packages."""

from setuptools import find_packages, setup

FOLDERS = ("train", "data", "models", "conf", "launch")

setup(
    packages=[
        f"longtake.{name}"
        for folder in FOLDERS
        for name in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))
    ]
)
