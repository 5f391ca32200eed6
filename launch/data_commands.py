"""Sub-commands on data: world, pack, index, verify, stats, plan-steps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longtake.launch import world_command
from longtake.launch.command import Command, positive, size, steps


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake pack`."""
    parser.add_argument("folder", type=Path, help="folder of video and image files")
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument(
        "--captions",
        type=Path,
        help='JSON lines {"file": …, "caption": …} (default: FOLDER/captions.jsonl or, without '
        "one, clip.json and clip.txt beside clip.mp4)",
    )
    parser.add_argument("--dataset", help="name that sample ids derive from (default: name of OUT)")
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, help="share of the sources that get split val"
    )
    parser.add_argument(
        "--recode",
        type=size,
        metavar="SIZE",
        help="re-encode, shrunk until the frame just covers HEIGHTxWIDTH, or N for a shorter side "
        "of N; never enlarged, so 8192 keeps the size (default: bytes stay as they are)",
    )
    parser.add_argument("--gop", type=positive, help="frames between keyframes (default: 30)")
    parser.add_argument("--crf", type=int, help="x264's quality, less is better (default: 16)")
    parser.add_argument("--pixel-format", choices=("yuv420p", "yuv444p"), help="default: yuv420p")
    parser.add_argument("--max-duration", type=float, help="split there, in seconds (--recode)")
    parser.add_argument(
        "--min-duration", type=float, default=0.0, help="drop shorter videos and parts, in seconds"
    )
    parser.add_argument(
        "--audio", choices=("keep", "drop"), help="default: drop with --recode, else keep"
    )
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--no-dedup", action="store_true", help="keep files of equal bytes")
    parser.add_argument("--max-samples", type=positive, default=500, help="in a shard")
    parser.add_argument("--max-bytes", type=positive, default=2**28, help="in a shard, about")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds without a frame: give up the file"
    )


def run_pack(args: argparse.Namespace) -> int:
    """Turn a folder of ordinary files with captions into shards."""
    from longtake.data.pack import pack_folder
    from longtake.data.pack.recode import Recipe

    given = {name: getattr(args, name) for name in ("gop", "crf", "pixel_format", "max_duration")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and args.recode is None:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} needs --recode SIZE")
    recipe = Recipe(
        size=args.recode,
        min_duration=args.min_duration,
        keep_audio=args.audio == "keep" or (args.audio is None and args.recode is None),
        **given,
    )
    report = pack_folder(
        *(args.folder, args.out, args.captions),
        recipe=recipe,
        dataset=args.dataset,
        val_fraction=args.val_fraction,
        dedup=not args.no_dedup,
        max_samples=args.max_samples,
        max_bytes=args.max_bytes,
        num_workers=args.workers,
        timeout=args.timeout,
    )
    print(report.summary())
    return 0


def index_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake index`."""
    parser.add_argument("shards", help="folder or URL of *.tar")
    parser.add_argument("--out", type=Path, help="catalogue folder (default: SHARDS/catalogue)")
    parser.add_argument("--dataset", help="name that sample ids derive from (default: folder name)")
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument(
        "--probe",
        choices=("header", "full"),
        default="header",
        help="full decodes every frame, and rejects what does not decode",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="index all shards, also those of the same size and time of change as before",
    )


def run_index(args: argparse.Namespace) -> int:
    """Build the catalogue of a folder of shards."""
    from longtake.data.catalogue import index_shards

    manifest = index_shards(
        args.shards,
        out=args.out,
        dataset=args.dataset,
        num_workers=args.workers,
        probe=args.probe,
        fresh=args.fresh,
    )
    print(
        f"{args.shards}: {manifest.num_samples} samples in {len(manifest.shards)} shards, "
        f"dataset {manifest.dataset}"
    )
    for line in manifest.remarks():
        print(line)
    return 0


def folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the commands that read one catalogued folder."""
    parser.add_argument("shards", help="folder or URL of *.tar with a catalogue")
    parser.add_argument("--catalogue", help="catalogue folder or URL, when it lies elsewhere")
    parser.add_argument("--where", default="", help="filter, such as \"split = 'val'\"")


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake verify`."""
    folder_arguments(parser)
    parser.add_argument("--no-decode", action="store_true", help="check hashes only")
    parser.add_argument("--workers", type=positive, default=2)


def run_verify(args: argparse.Namespace) -> int:
    """Print every defect of a set. Exit code 0: clean, 1: defects, 2: it could not be checked."""
    from longtake.data.catalogue.verify import verify_shards

    try:
        report = verify_shards(
            args.shards,
            args.catalogue,
            where=args.where,
            decodes=not args.no_decode,
            num_workers=args.workers,
        )
    except ValueError as error:
        print(f"longtake verify: {error}", file=sys.stderr)
        return 2
    for defect in report.defects:
        print(defect, file=sys.stderr)
    found = f"damaged: {len(report.defects)} defects" if report.defects else "intact"
    print(f"{args.shards}: {report.samples} samples checked, {found}")
    return 1 if report.defects else 0


def stats_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake stats`."""
    folder_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw into FILE.png or FILE.html")


def run_stats(args: argparse.Namespace) -> int:
    """Print, and draw, what a catalogued folder holds."""
    from longtake.launch.audit import print_stats

    print_stats(args.shards, args.catalogue, args.where, plot=args.plot)
    return 0


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake plan-steps`."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="DATA | RUN | KEY=VALUE",
        help="shards with a catalogue, a run folder, or overrides as for `longtake train`; with "
        "shards, overrides of data.* and seed",
    )
    parser.add_argument("--catalogue", help="catalogue folder, when it lies elsewhere")
    parser.add_argument(
        "--steps", type=steps, default=range(1), metavar="A:B", help="A <= step < B"
    )
    parser.add_argument("--world-size", type=positive, default=1, help="data-parallel ranks")
    parser.add_argument("--rank", type=int, help="only the slots of this rank")
    parser.add_argument("--bytes", action="store_true", help="add bytes, and their sum per node")
    parser.add_argument("--ranks-per-node", type=positive, default=1)


def run_plan_steps(args: argparse.Namespace) -> int:
    """Print which samples form which step."""
    from longtake.launch.plan_steps import print_steps

    print_steps(args)
    return 0


COMMANDS = (
    world_command.COMMAND,
    Command("pack", "turn a folder of videos with captions into shards", pack_arguments, run_pack),
    Command("index", "write the catalogue of a folder of shards", index_arguments, run_index),
    Command("verify", "decode and check every sample", verify_arguments, run_verify),
    Command("stats", "show what a folder of shards holds", stats_arguments, run_stats),
    Command(
        *("plan-steps", "print the samples of training steps", plan_arguments, run_plan_steps),
        trailing="words",
    ),
)
