"""`longtake world`: write shards of the procedural world; or show it, check it, ask for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from longtake.launch.command import Command, names, positive, size

if TYPE_CHECKING:
    from rich.table import Table

    from longtake.data.world.validity import Validity

Value = TypeVar("Value")
NUM_CLIPS = 1000
PER_FAMILY = 64
MIN_CHECKED = 16


def world_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake world`."""
    add = parser.add_argument
    add("out", type=Path, nargs="?", help="folder for the shards")
    add(
        "--clips",
        type=positive,
        help=f"number of clips (default: {NUM_CLIPS}); with --check and --prompts of each family "
        f"(default: {PER_FAMILY})",
    )
    add("--families", type=names, default="all", help="comma-separated, or all")
    add(
        "--split",
        choices=("train", "val", "combo", "ood"),
        help="(default: train; val with --check and --prompts)",
    )
    add("--frames", type=_listed(positive), default="17", help="one or several; 1 is an image")
    add("--size", type=_listed(size), default="32x32", help="HEIGHTxWIDTH, one or several")
    add("--fps", type=_listed(float), default="8", help="one or several")
    add("--defects", type=_share, metavar="SHARE", help="of the clips get a planted defect")
    add("--seed", type=int, default=0)
    add("--workers", type=positive, default=2)
    instead = parser.add_argument_group("instead of shards")
    one = instead.add_mutually_exclusive_group()
    one.add_argument(
        "--show",
        type=Path,
        nargs="?",
        const=Path("world.png"),
        metavar="PNG",
        help="draw a few clips of each family (default: world.png)",
    )
    one.add_argument("--check", action="store_true", help="measure whether scores can be trusted")
    one.add_argument(
        "--prompts",
        type=Path,
        metavar="JSONL",
        help="write prompts; `longtake evaluate --videos` scores what another program draws",
    )
    instead.add_argument(
        "--kind", choices=("dense", "short", "zh"), help="of --prompts (default: dense)"
    )


def run_world(args: argparse.Namespace) -> int:
    """Write shards with their catalogue, or do what was asked for instead."""
    from longtake.data.world import FAMILIES, Shapes

    modes = [name for name in ("out", "show", "check", "prompts") if getattr(args, name)]
    if len(modes) != 1:
        raise ValueError("give one of OUT (a folder for shards), --show, --check and --prompts")
    for name, mode in (("defects", "out"), ("kind", "prompts")):
        if getattr(args, name) is not None and modes != [mode]:
            rule = "is for shards only" if mode == "out" else f"needs --{mode}"
            raise ValueError(f"--{name} {rule}")
    if args.families == ("all",):
        args.families = tuple(FAMILIES)
    args.shapes = Shapes(args.size, args.frames, args.fps)
    return {"out": _write, "show": _show, "check": _check, "prompts": _ask}[modes[0]](args)


def _write(args: argparse.Namespace) -> int:
    from longtake.data.world import write_world

    report = write_world(
        args.out,
        families=args.families,
        num_clips=args.clips or NUM_CLIPS,
        split=args.split or "train",
        shapes=args.shapes,
        defects=args.defects or 0.0,
        seed=args.seed,
        num_workers=args.workers,
    )
    print(f"{args.out}: {report}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from longtake.data.world import contact_sheet

    if len(args.size) + len(args.frames) + len(args.fps) > 3:
        raise ValueError("--show draws clips of one shape: give one --size, --frames and --fps")
    path = contact_sheet(
        args.show,
        families=args.families,
        split=args.split or "train",
        frames=args.frames[0],
        height=args.size[0][0],
        width=args.size[0][1],
        fps=args.fps[0],
        seed=args.seed,
    )
    print(path)
    return 0


def _ask(args: argparse.Namespace) -> int:
    from longtake.data.world.prompts import write_prompts

    number = write_prompts(
        args.prompts,
        families=args.families,
        num_prompts=args.clips or PER_FAMILY,
        kind=args.kind or "dense",
        split=args.split or "val",
        shapes=args.shapes,
        seed=args.seed,
    )
    print(f"{args.prompts}: {number} prompts")
    return 0


def _check(args: argparse.Namespace) -> int:
    """Print how every score fares, a table for each shape; 1 if one breaks the world's rule."""
    if (args.clips or PER_FAMILY) < MIN_CHECKED:
        raise ValueError(f"--clips {args.clips}: fewer than {MIN_CHECKED} clips check nothing")
    from rich.console import Console
    from rich.progress import track

    from longtake.data.process_map import map_processes
    from longtake.data.world.clips import Shapes, check_request

    jobs = [
        _Job(number, family, args.split or "val", frames, side, args.clips or PER_FAMILY, args.seed)
        for number, (frames, side, family) in enumerate(
            product(args.frames, args.size, args.families)
        )
    ]
    for job in jobs:
        check_request([job.family], job.split, Shapes((job.size,), (job.frames,)))
    done = dict(
        track(
            map_processes(_measure, jobs, args.workers),
            "check",
            total=len(jobs),
            console=Console(stderr=True),
        )
    )
    problems = []
    for title, same in groupby(jobs, key=lambda job: job.title):
        rows = [row for job in same for row in done[job.number]]
        Console().print(validity_table(title, rows))
        problems += [f"{title}: {text}" for row in rows for text in row.problems()]
    for line in problems:
        print(line)
    return 1 if problems else 0


@dataclass(frozen=True, slots=True)
class _Job:
    """A family to be measured at one shape."""

    number: int
    family: str
    split: str
    frames: int
    size: tuple[int, int]
    num_clips: int
    seed: int

    @property
    def title(self) -> str:
        return f"{self.split}, {self.frames} frames of {self.size[0]}x{self.size[1]}"


def _measure(job: _Job) -> tuple[int, list[Validity]]:
    from longtake.data.world.validity import measure

    height, width = job.size
    rows = measure(
        job.family,
        split=job.split,
        frames=job.frames,
        height=height,
        width=width,
        num_clips=job.num_clips,
        seed=job.seed,
    )
    return job.number, rows


def validity_table(title: str, rows: Sequence[Validity]) -> Table:
    """A line for each score of each family, in 79 columns; red ones break the rule."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("family", no_wrap=True)
    table.add_column("score", overflow="fold")
    for name in ("truth", "other", "chance"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst fault", overflow="fold")
    table.add_column("least when unmoved", overflow="fold")
    family = None
    for row in rows:
        fault, unmoved = _named(row.faults, max), _named(row.unmoved, min)
        shown = row.family if row.family != family else ""
        family = row.family
        numbers = (f"{value:.2f}" for value in (row.truth, row.shuffled, row.chance))
        style = "red" if row.problems() else None
        table.add_row(shown, row.score, *numbers, fault, unmoved, style=style)
    table.caption = "other: true clips under the captions of others, which must be worth chance"
    return table


def _named(values: Mapping[str, float], pick: Callable[..., str]) -> str:
    """The greatest or least of some values, with its name."""
    if not values:
        return "none"
    name = pick(values, key=lambda name: values[name])
    return f"{values[name]:.2f} {name.replace('_', ' ')}"


def _listed(kind: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """`a,b,c` → (kind("a"), kind("b"), kind("c"))."""

    def read(text: str) -> tuple[Value, ...]:
        return tuple(kind(part) for part in names(text))

    return read


def _share(text: str) -> float:
    """A number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share in [0, 1], such as 0.1")
    return value


COMMAND = Command("world", "write shards of the procedural world", world_arguments, run_world)
