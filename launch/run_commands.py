"""Sub-commands on runs: train, sample, export, report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longtake.launch.command import Command, positive, size
from longtake.launch.torchrun import EXIT_FAILED, Launch, run_torchrun


def inference_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Arguments of the commands that run a model."""
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    device_arguments(parser, batch_size)


def device_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """How a model is run."""
    parser.add_argument("--batch-size", type=positive, default=batch_size)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--vae-run", type=Path, help="VAE run (default: the one the run names)")


def sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the commands that draw videos; None means the run's own `samples.*`."""
    parser.add_argument("--steps", type=positive, help="sampler steps (default: samples.steps)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: samples.*)")
    parser.add_argument("--shift", type=float, help="timestep shift (default: samples.shift)")
    parser.add_argument("--solver", choices=("euler", "unipc"), help="(default: samples.solver)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake train`."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="experiment=demo_vae …")
    parser.add_argument("--nproc", type=positive, default=1, help="processes on this node")
    parser.add_argument("--nnodes", type=positive, default=1, help="number of nodes")
    parser.add_argument("--node-rank", type=int, default=0, help="this node's number, from 0")
    parser.add_argument("--rendezvous", default="", help="HOST:PORT of node 0")
    parser.add_argument("--run-id", default="longtake", help="same name on every node of one run")
    parser.add_argument(
        "--interface", default="", help="network interface of all traffic between ranks, eth0"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, help="starts after a rank was killed or has failed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print config, first steps, parameters, memory; stop"
    )


def run_train(args: argparse.Namespace) -> int:
    """Train in this process, or start torchrun; exit code 0, 1 or 75."""
    from longtake.launch.compose import compose

    launch = Launch(
        num_processes=args.nproc,
        num_nodes=args.nnodes,
        node_rank=args.node_rank,
        rendezvous=args.rendezvous,
        run_id=args.run_id,
        max_restarts=args.max_restarts,
        interface=args.interface,
    )
    config = compose(args.overrides)  # a typo must fail here, not on every rank
    if args.dry_run:
        from longtake.launch.dry_run import dry_run

        dry_run(config, launch.num_processes * launch.num_nodes)
        return 0
    if launch.num_processes > 1 or launch.num_nodes > 1 or launch.max_restarts:
        return run_torchrun(launch, args.overrides, Path(config.output_dir))
    from longtake.train.main import main

    sys.argv = ["longtake train", *args.overrides]
    main()  # leaves the process itself, with 0, 1 or 75
    return EXIT_FAILED


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake sample`."""
    parser.add_argument("run", type=Path, help="run folder or checkpoint of a DiT")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts-file", type=Path, help="text file, one prompt a line")
    parser.add_argument("--image", help="first frame (image or video file): i2v")
    parser.add_argument("--task", help="one the run was trained on, such as join (default: t2v)")
    parser.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="FILE[@FRAME]",
        help="image or clip that the task gives, in order; may be repeated",
    )
    parser.add_argument(
        "--given-noise", type=float, default=0.0, help="noise level at which they are shown"
    )
    parser.add_argument("--negative", help="what to lead away from (default: samples.*)")
    parser.add_argument(
        "--tell",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a number the run was told (numbers.sources); may be repeated",
    )
    parser.add_argument("--out", type=Path, help="folder (default: RUN/samples/command)")
    parser.add_argument(
        "--frames", type=positive, help="(default: the longest bucket that fits the task)"
    )
    parser.add_argument("--size", type=size, help="HEIGHTxWIDTH (default: that of this bucket)")
    parser.add_argument("--fps", type=float, help="(default: the rate of the training clips)")
    parser.add_argument("--num", type=positive, default=1, help="videos per prompt")
    parser.add_argument(
        "--upscale", type=int, help="whole factor of the files (default: up to 256 px; 1: as drawn)"
    )
    sampler_arguments(parser)
    inference_arguments(parser, batch_size=8)


def run_sample(args: argparse.Namespace) -> int:
    """Draw videos for prompts."""
    from longtake.train.sample import SampleRequest, sample_to_files

    prompts = list(args.prompts)
    if args.prompts_file is not None:
        lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give one or more, or --prompts-file FILE")
    request = SampleRequest(
        prompts=prompts,
        num_videos=args.num,
        task=args.task or ("i2v" if args.image else "t2v"),
        given=[*([args.image] if args.image else []), *args.given],
        given_noise=args.given_noise,
        negative=args.negative,
        numbers=dict(map(told_number, args.tell)),
        frames=args.frames,
        size=args.size,
        fps=args.fps,
        upscale=args.upscale,
        seed=args.seed,
        steps=args.steps,
        guidance_scale=args.guidance,
        shift=args.shift,
        solver=args.solver,
        batch_size=args.batch_size,
    )
    paths = sample_to_files(
        args.run, request, args.out, weights=args.weights, vae=args.vae_run, device=args.device
    )
    for path in paths:
        print(path)
    return 0


def told_number(text: str) -> tuple[str, float]:
    """NAME=NUMBER; ValueError for anything else."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise ValueError(f"--tell {text}: must be NAME=NUMBER, such as fps=24") from None


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake export`."""
    parser.add_argument("run", type=Path, help="run folder or checkpoint of a DiT")
    parser.add_argument("out", type=Path, help="folder for the diffusers pipeline")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--vae-run", type=Path, help="VAE run (default: the one the run names)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument(
        "--adapters", action="store_true", help="of a LoRA run: the adapters alone, unmerged"
    )


def run_export(args: argparse.Namespace) -> int:
    """Write and verify a stock diffusers pipeline, or write the adapters for one."""
    from longtake.train.export import export_adapters, export_run

    if args.adapters:
        print(export_adapters(args.run, args.out, weights=args.weights, overwrite=args.overwrite))
        return 0
    report = export_run(
        args.run, args.out, weights=args.weights, vae=args.vae_run, overwrite=args.overwrite
    )
    print(report)
    return 0


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `longtake report`."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--vae-run", type=Path, help="VAE run to show beside it")
    parser.add_argument(
        "--scores",
        type=Path,
        action="append",
        default=[],
        help="folder that `longtake evaluate --out` wrote, besides RUN/evaluation/*",
    )
    parser.add_argument("--out", type=Path, help="HTML file (default: RUN/report.html)")
    parser.add_argument("--picture", type=Path, help="PNG (default: RUN/report.png)")


def run_report(args: argparse.Namespace) -> int:
    """Write report.html and a picture of the samples."""
    from longtake.train.report import write_report

    paths = write_report(
        args.run, vae_run=args.vae_run, out=args.out, picture=args.picture, scores=args.scores
    )
    for path in paths:
        print(path)
    return 0


COMMANDS = (
    Command(
        *("train", "train a VAE or a DiT; the same command resumes", train_arguments, run_train),
        trailing="overrides",
    ),
    Command("sample", "draw videos for prompts", sample_arguments, run_sample, trailing="prompts"),
    Command("export", "write a stock diffusers pipeline", export_arguments, run_export),
    Command("report", "write report.html and its picture", report_arguments, run_report),
)
