"""`longtake encode`: latents and text of a folder of shards, on any number of processes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from longtake.launch.command import Command, names, positive, size
from longtake.launch.run_commands import inference_arguments
from longtake.launch.torchrun import is_worker, run_on_processes


def encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake encode`."""
    add = parser.add_argument
    add("vae", type=Path, help="run folder or checkpoint of a VAE")
    add("shards", type=Path, help="folder of catalogued pixel shards")
    add("out", type=Path, help="folder for the latent shards")
    add(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="of the DiT that will train on them, for its text encoder: experiment=…, text=…",
    )
    add("--catalogue", type=Path, help="catalogue, when it lies elsewhere")
    add("--where", default="", help="filter, such as \"split = 'val'\"")
    add("--frames", type=positive, help="(default: the VAE's first bucket)")
    add("--size", type=size, help="HEIGHTxWIDTH (default: the VAE's first bucket)")
    add("--fps", type=float, help="frames per second (default: the VAE run's)")
    add("--captions", type=names, help="caption kinds to tokenise (default: all)")
    add("--variants", type=positive, default=1, help="cuts of each clip: central, then drawn ones")
    add(
        "--segments",
        type=names,
        default=(),
        help="pieces encoded alone for tasks that give them: last, suffix:N, every:K, shown:N+M",
    )
    add("--logvar", action="store_true", help="keep the posterior's log variance too")
    add("--stats-from", type=Path, help="latents folder whose mean and std to take over")
    add("--nproc", type=positive, default=1, help="processes on this machine")
    add("--dry-run", action="store_true", help="print how large it will be, and stop")
    inference_arguments(parser, batch_size=16)


def run_encode(args: argparse.Namespace) -> int:
    """Encode in this process or on several; exit code 0 or 1."""
    from longtake.data.processes import die_with_parent
    from longtake.launch.compose import compose_dit
    from longtake.train.encode import encode_shards, forecast_encode
    from longtake.train.encode_plan import EncodeOptions

    options = EncodeOptions(
        catalogue=args.catalogue,
        where=args.where,
        frames=args.frames,
        size=args.size,
        fps=args.fps,
        caption_kinds=args.captions,
        variants=args.variants,
        segments=args.segments,
        logvar=args.logvar,
        text=compose_dit(["stage=dit", *args.overrides]).text,
        stats_from=args.stats_from,
        weights=args.weights,
        batch_size=args.batch_size,
        device=args.device,
    )
    if args.dry_run:
        print(forecast_encode(args.vae, args.shards, options))
        return 0
    if is_worker():
        die_with_parent(os.getppid())
    elif args.nproc > 1:
        forecast_encode(args.vae, args.shards, options)  # a mistake is told once, here
        return run_on_processes(args.nproc, args.argv)
    rank, num_ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    report = encode_shards(args.vae, args.shards, args.out, options, rank=rank, num_ranks=num_ranks)
    if rank == 0:
        print(report)
    return 0


COMMANDS = (
    Command(
        *("encode", "cache latents and text of a folder of shards", encode_arguments, run_encode),
        trailing="overrides",
    ),
)
