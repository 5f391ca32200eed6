"""What a sub-command is, and the small argument types that several of them share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass


class UserError(Exception):
    """A mistake of the caller that a library reports by an exception of its own."""


@dataclass(frozen=True)
class Command:
    """One sub-command: `run(args)` returns the exit code.

    `trailing` names the list argument that also takes words given after options, which argparse
    would refuse: `train experiment=demo_dit --nproc 2 train.steps=10`.
    """

    name: str
    title: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    trailing: str = ""


def size(text: str) -> tuple[int, int]:
    """`HxW` or `N` (square) in pixels → (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 32x48")
    height = int(match[1])
    return height, int(match[2] or height)


def names(text: str) -> tuple[str, ...]:
    """`a,b,c` → ("a", "b", "c")."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise argparse.ArgumentTypeError("needs at least one name")
    if len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} names something twice")
    return parts


def positive(text: str) -> int:
    """A whole number ≥ 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def steps(text: str) -> range:
    """`A:B` → range(A, B); one number A → range(A, A + 1)."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None or (match[2] and int(match[2]) <= int(match[1])):
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B with A < B, such as 0:12")
    return range(int(match[1]), int(match[2] or int(match[1]) + 1))
