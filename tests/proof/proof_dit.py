"""`make proof`, its second half: a DiT learns the world through a VAE, by the product's commands.

`python -m tests.proof.proof_dit [--out runs/proof] [--docs docs/proof]` from the repository root. A
second call goes on where the first one stopped. What was reached is written to `docs/proof/`, bars
that were missed included; the exit code is 1 then.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from longtake.launch.demo import RANKS, Gate, Phase, paths, print_closing
from longtake.train.report_curves import read_series
from tests.proof.pictures import draw_curves, draw_samples
from tests.proof.proof_vae import run_counted, train, write_found

EXPERIMENT = "proof_dit"
FAMILIES = "move", "count", "leftright"
SHAPE = "--size", "32x32", "--frames", "17"
MAX_MINUTES = 90.0  # of the DiT's training
MARGIN = 0.1  # by which an interval clears what a clip reaches that ignores the word
# Clips of five latent frames have two of them as a suffix, and all of them as stills.
SEGMENTS = "--segments", "suffix:5,last,every:4"
GIVEN = {"extend_backward": 0.55, "first_last": 0.75, "in_between": 0.75}  # where they must go on
# Appearance, direction, left and right, number.
LEARNED = (
    *(("move", "colour"), ("move", "direction")),
    *(("leftright", "relation"), ("count", "count")),
)


def phases(out: Path) -> list[Phase]:
    """World, the VAE in three parts as in `proof_vae`, latents, the DiT, its scores."""
    clips, latents, dit = out / "dit_clips", out / "dit_latents", out / "dit"
    images, short, vae = (out / f"dit_vae_{part}" for part in ("images", "short", "whole"))

    def vae_part(title: str, experiment: str, folder: Path, frames: int, *more: str) -> Phase:
        size = {1: 8, 5: 4, 17: 2}[frames]
        bucket = f"{{frames: {frames}, height: 32, width: 32, batch_size: {size}}}"
        # None of its families changes its looks; for three of them half of the width will do.
        own = (
            *("vae.base_dim=16", "vae.patch_size=1", "cuts=0", "fades=0", "speed.compile=false"),
            *(f"data.buckets=[{bucket}]", "data.micro_batches_per_step=2", *RANKS),
        )
        return train(f"VAE, {title}", experiment, folder, *own, *paths(clips), *more)

    make = ("--families", ",".join(FAMILIES), *SHAPE)
    counts = {"train": "9000", "val": "600"}

    def encode(split: str, *more: str) -> Phase:
        folders = f"{vae}", f"{clips}/{split}", f"{latents}/{split}"
        return Phase(
            f"encode, {split}", ("encode", *folders, f"experiment={EXPERIMENT}", *SEGMENTS, *more)
        )

    return [
        *(
            Phase(
                f"world, {split}",
                ("world", f"{clips}/{split}", "--split", split, *make, "--clips", count),
            )
            for split, count in counts.items()
        ),
        vae_part("single frames", "proof_vae_images", images, 1, "train.steps=400"),
        vae_part("5 frames", "proof_vae_short", short, 5, f"init_from={images}", "train.steps=300"),
        vae_part("17 frames", "proof_vae", vae, 17, f"init_from={short}", "train.steps=500"),
        encode("train"),
        encode("val", "--stats-from", f"{latents}/train"),
        train("DiT", EXPERIMENT, dit, *paths(latents), *RANKS),
        Phase(
            "evaluate",
            ("evaluate", f"{dit}", "--out", f"{out}/dit_scores", "--splits", "val")
            + ("--prompts", "256", "--weights", "ema", *RANKS),
        ),
    ]


def gates(card: dict[str, Any], minutes: float) -> list[Gate]:
    """What is asked: time, intervals that lie well above what ignoring the word reaches, and that
    clips go on from given frames where the true ones went."""
    of_task: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for score in card["scores"]:
        of_task[score["task"], score["name"]].append(score)

    def one(family: str, name: str) -> dict[str, Any]:
        return next(s for s in of_task["t2v", name] if s["family"] == family)

    above = {key: one(*key)["low"] - one(*key)["blind"] for key in LEARNED}
    went = {task: fmean(s["score"] for s in of_task[task, "continuation"]) for task in GIVEN}
    return [
        Gate("DiT: CPU minutes of training", minutes, MAX_MINUTES, is_upper=True),
        *(Gate(f"{': '.join(key)}, interval above blind by", above[key], MARGIN) for key in above),
        *(Gate(f"{task}: as the truth goes on", went[task], bar) for task, bar in GIVEN.items()),
    ]


def prove(out: Path, docs: Path, console: Console) -> list[Gate]:
    """Run what is missing, write what was reached."""
    todo = phases(out)
    timings = [run_counted(phase, out / "dit_seconds.json", console) for phase in todo]
    minutes = {t.title: round(t.cpu / 60, 1) for t in timings}
    card = json.loads((out / "dit_scores" / "card.json").read_text(encoding="utf-8"))
    met = gates(card, minutes["DiT"])
    series = read_series(out / "dit")
    found = {
        "cpu_minutes": minutes,
        "vae_psnr": round(read_series(out / "dit_vae_whole")["val/psnr_ema"].values[-1], 2),
        "loss": dict(zip(series["val/loss_ema"].steps, series["val/loss_ema"].values, strict=True)),
        "scores": card["scores"],
    }
    write_found(found, met, docs / "dit_world.json")
    draw_curves({"DiT": series["val/loss_ema"]}, docs / "dit_world_curves.png", "validation loss")
    draw_samples(out / "dit_scores", docs / "dit_world.png")
    print_closing(timings, met, console)
    return met


def main() -> int:
    """Run all phases, write what was reached; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="tests.proof.proof_dit", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--docs", type=Path, default=Path("docs/proof"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return 0 if all(gate.is_met for gate in prove(args.out, args.docs, Console())) else 1


if __name__ == "__main__":
    sys.exit(main())
