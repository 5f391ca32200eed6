"""`longtake evaluate`: score a run, on the world or on clips of one's own, or anybody's videos."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from longtake.launch.command import Command, names, positive, size
from longtake.launch.run_commands import device_arguments, sampler_arguments
from longtake.launch.torchrun import is_worker, run_on_processes


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake evaluate`."""
    add = parser.add_argument
    add("run", type=Path, nargs="?", help="run folder or checkpoint of a DiT")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--videos", type=Path, help="instead of a run: score videos that any program drew"
    )
    what.add_argument("--clips", type=Path, help="score the run on captioned shards of your own")
    add("--tasks", type=names, help="(default: those the run was trained on)")
    add("--weights", type=names, help="of ema, raw (default: both; with --clips: ema)")
    add("--captions", help="caption kind (default: the run's most used)")
    add(
        "--show",
        type=int,
        help="clips per family, or in all with --clips, kept as mp4 (default: 4)",
    )
    add("--out", type=Path, help="folder (default: in RUN/evaluation, or VIDEOS-scores)")
    sampler_arguments(parser)
    device_arguments(parser, batch_size=32)
    add = parser.add_argument_group("on the world").add_argument
    add("--families", type=names, help="(default: those of the training data)")
    add("--splits", type=names, help="of train, val, combo, ood (default: all but train)")
    add("--prompts", type=positive, help="per family and split (default: 64)")
    add("--pairs", type=int, help="prompts of val with a twin (default: --prompts)")
    add("--drift", type=positive, help="up to so many trained lengths (default: 1)")
    add("--frames", type=positive, help="(default: the longest bucket that fits the task)")
    add("--size", type=size, help="HEIGHTxWIDTH (default: that of this bucket)")
    add("--nproc", type=positive, help="processes that share the work (default: 1)")
    add = parser.add_argument_group("of videos (--videos)").add_argument
    add("--prompts-file", type=Path, help="(default: VIDEOS/prompts.jsonl)")
    add = parser.add_argument_group("on clips of your own (--clips)").add_argument
    add("--where", help="filter, such as \"split = 'val'\"")
    add("--catalogue", type=Path, help="catalogue, when it lies elsewhere")
    add("--num", type=positive, help="clips (default: 256)")
    add("--fps", type=float, help="frames per second (default: the run's)")
    add("--train-shards", type=Path, help="to search for copies (default: the run's)")
    add("--no-memorisation", action="store_true", default=None, help="do not search for copies")
    add("--fvd-weights", type=Path, help="TorchScript of I3D; loading it runs the code it holds")
    add("--clip-model", type=Path, help="folder of a transformers CLIP")


DRAWING = "run out tasks weights captions show steps guidance shift solver vae_run"
MEANT = {
    "videos": "videos out prompts_file",
    "clips": f"clips {DRAWING} where catalogue num fps train_shards no_memorisation fvd_weights "
    "clip_model",
    "run": f"{DRAWING} families splits prompts pairs drift frames size nproc",
}
"""What each way of evaluating listens to, besides seed, batch_size and device."""


def run_evaluate(args: argparse.Namespace) -> int:
    """Score, print the table, write card.json; exit code 0 or 1."""
    if (args.run is None) == (args.videos is None):
        raise ValueError("evaluate takes a run, or --videos FOLDER")
    mode = next(name for name in MEANT if getattr(args, name) is not None)
    always = {"seed", "batch_size", "device", "command", "argv"}
    for name, value in vars(args).items():
        if value is not None and name not in always | set(MEANT[mode].split()):
            where = "on the world" if mode == "run" else f"with --{mode}"
            raise ValueError(f"--{name.replace('_', '-')} means nothing {where}: leave it out")
    if args.show is not None and args.show < 0:
        raise ValueError(f"--show {args.show} must be at least 0")
    return {"videos": _score_videos, "clips": _score_on_clips, "run": _score_on_world}[mode](args)


def _score_on_world(args: argparse.Namespace) -> int:
    from longtake.data.processes import die_with_parent
    from longtake.train.card import print_card
    from longtake.train.evaluate import EvaluateOptions, check_run, evaluate_run
    from longtake.train.ranks import init_distributed, shutdown
    from longtake.train.runs import pick_device

    given = {
        "families": args.families,
        "splits": args.splits,
        "num_prompts": args.prompts,
        "num_pairs": args.pairs,
        "drift": args.drift,
        "caption_kind": args.captions,
        "tasks": args.tasks,
        "weights": args.weights,
        "frames": args.frames,
        "size": args.size,
        "num_shown": args.show,
        "seed": args.seed,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "shift": args.shift,
        "solver": args.solver,
        "batch_size": args.batch_size,
    }
    options = EvaluateOptions(**{name: v for name, v in given.items() if v is not None})
    if is_worker():
        die_with_parent(os.getppid())
    elif (args.nproc or 1) > 1:
        check_run(args.run, options)  # a mistake is told once, not by every process
        return run_on_processes(args.nproc, args.argv)
    ranks = init_distributed(pick_device(args.device).type)
    result = evaluate_run(args.run, options, args.out, vae=args.vae_run, ranks=ranks)
    if ranks.is_main:
        print_card(result.card)
        print(result.folder / "card.json")
    if ranks.world_size > 1:
        shutdown(0)
    return 0


def _score_videos(args: argparse.Namespace) -> int:
    from longtake.train.card import print_card
    from longtake.train.evaluate_videos import evaluate_videos

    result = evaluate_videos(args.videos, args.out, prompts=args.prompts_file)
    print_card(result.card)
    print(result.folder / "card.json")
    return 0


def _score_on_clips(args: argparse.Namespace) -> int:
    from longtake.train.clips_card import print_clips_card
    from longtake.train.evaluate_clips import CARD, ClipsOptions, evaluate_clips

    given = {
        "where": args.where,
        "catalogue": args.catalogue,
        "num_clips": args.num,
        "caption_kind": args.captions,
        "tasks": args.tasks,
        "fps": args.fps,
        "memorisation": None if args.no_memorisation is None else False,
        "train": args.train_shards,
        "fvd_weights": args.fvd_weights,
        "clip_model": args.clip_model,
        "num_shown": args.show,
        "seed": args.seed,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "shift": args.shift,
        "solver": args.solver,
        "batch_size": args.batch_size,
    }
    options = ClipsOptions(**{name: v for name, v in given.items() if v is not None})
    weights = args.weights or ("ema",)
    if len(weights) > 1 or weights[0] not in ("ema", "raw"):
        raise ValueError(f"--weights {','.join(weights)}: --clips scores one of ema and raw")
    result = evaluate_clips(
        *(args.run, args.clips, options, args.out),
        weights=weights[0],
        vae=args.vae_run,
        device=args.device,
    )
    print_clips_card(result.card)
    print(result.folder / CARD)
    return 0


COMMANDS = (Command("evaluate", "score a run or videos", evaluate_arguments, run_evaluate),)
