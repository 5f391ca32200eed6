"""Sub-commands on data: world, pack, index, verify, stats, plan-steps."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longtake.launch.command import Command, names, positive, size


def world_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake world`."""
    parser.add_argument("out", type=Path, help="folder for the shards (a PNG with --show)")
    parser.add_argument("--clips", type=positive, default=1000, help="number of clips")
    parser.add_argument("--families", type=names, help="comma-separated (default: all)")
    parser.add_argument("--split", default="train", choices=("train", "val", "combo", "ood"))
    parser.add_argument("--frames", type=positive, default=17)
    parser.add_argument("--size", type=size, default=(32, 32), help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--fps", type=positive, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--show", action="store_true", help="draw a few clips of each family only")


def run_world(args: argparse.Namespace) -> int:
    """Write shards of the procedural world, with their catalogue."""
    from longtake.data.world import FAMILIES, contact_sheet, write_world

    height, width = args.size
    shape: dict[str, Any] = {"frames": args.frames, "height": height, "width": width}
    common = {"split": args.split, "fps": args.fps, "seed": args.seed, **shape}
    families = args.families or tuple(FAMILIES)
    if args.show:
        print(contact_sheet(args.out, families=families, **common))
        return 0
    report = write_world(
        args.out, families=families, num_clips=args.clips, num_workers=args.workers, **common
    )
    print(f"{args.out}: {report}")
    return 0


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake pack`."""
    parser.add_argument("folder", type=Path, help="folder of video and image files")
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument(
        "--captions",
        type=Path,
        help='JSON lines {"file": …, "caption": …} (default: FOLDER/captions.jsonl)',
    )
    parser.add_argument("--dataset", help="name that sample ids derive from (default: name of OUT)")
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, help="share of the sources that get split val"
    )


def run_pack(args: argparse.Namespace) -> int:
    """Turn a folder of ordinary files with captions into shards."""
    from longtake.data.pack import pack_folder

    report = pack_folder(
        *(args.folder, args.out, args.captions),
        dataset=args.dataset,
        val_fraction=args.val_fraction,
    )
    print(report.summary())
    return 0


def index_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake index`."""
    parser.add_argument("shards", type=Path, help="folder of *.tar")
    parser.add_argument("--out", type=Path, help="catalogue folder (default: SHARDS/catalogue)")
    parser.add_argument("--dataset", help="name that sample ids derive from (default: folder name)")
    parser.add_argument("--workers", type=positive, default=2)


def run_index(args: argparse.Namespace) -> int:
    """Build the catalogue of a folder of shards."""
    from longtake.data.catalogue import build_catalogue

    catalogue = build_catalogue(
        args.shards, out=args.out, dataset=args.dataset, num_workers=args.workers, progress=True
    )
    print(f"{args.shards}: {len(catalogue.table)} samples, dataset {catalogue.dataset}")
    for line in catalogue.rejections():
        print(line)
    return 0


def folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the commands that read one catalogued folder."""
    parser.add_argument("shards", type=Path, help="folder of *.tar with a catalogue")
    parser.add_argument("--catalogue", type=Path, help="catalogue folder, when it lies elsewhere")
    parser.add_argument("--where", default="", help="filter, such as \"split = 'val'\"")


def run_verify(args: argparse.Namespace) -> int:
    """Compare every payload with the catalogue's hash; 1 when anything is damaged."""
    from longtake.launch.audit import verify_shards

    problems = verify_shards(args.shards, args.catalogue, args.where)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(
        f"{args.shards}: {'damaged: ' + str(len(problems)) if problems else 'all samples intact'}"
    )
    return 1 if problems else 0


def run_stats(args: argparse.Namespace) -> int:
    """Print what a catalogued folder holds."""
    from longtake.launch.audit import print_stats

    print_stats(args.shards, args.catalogue, args.where)
    return 0


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake plan-steps`."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for `longtake train`")
    parser.add_argument("--first", type=int, default=0, help="first step")
    parser.add_argument("--steps", type=positive, default=1, help="number of steps")


def run_plan_steps(args: argparse.Namespace) -> int:
    """Print which samples form which step: one JSON line per micro-batch."""
    from longtake.data.plan import Plan
    from longtake.launch.compose import compose

    config = compose(args.overrides)
    plan = Plan.from_config(config.data, config.seed)
    for step in range(args.first, args.first + args.steps):
        for batch in plan.step(step, []):
            print(json.dumps(asdict(batch)))
    return 0


COMMANDS = (
    Command("world", "write shards of the procedural world", world_arguments, run_world),
    Command("pack", "turn a folder of videos with captions into shards", pack_arguments, run_pack),
    Command("index", "write the catalogue of a folder of shards", index_arguments, run_index),
    Command("verify", "check every sample against the catalogue", folder_arguments, run_verify),
    Command("stats", "show what a folder of shards holds", folder_arguments, run_stats),
    Command(
        *("plan-steps", "print the samples of training steps", plan_arguments, run_plan_steps),
        trailing="overrides",
    ),
)
