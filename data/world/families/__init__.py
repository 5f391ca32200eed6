"""Families of scenes; a new one is a new module here and nothing else."""

from importlib import import_module
from pkgutil import iter_modules

from longtake.data.world.families.registry import (
    FAMILIES,
    SPLITS,
    Ask,
    Canvas,
    Family,
    Form,
)

for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")

__all__ = ["FAMILIES", "SPLITS", "Ask", "Canvas", "Family", "Form"]
