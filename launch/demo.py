"""`make demo`: the whole road on two cores, each phase a command that also runs alone.

World shards → VAE → latents → DiT → stock pipeline, samples, scores, report. A second call resumes
where the first one stopped and finds finished phases done.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Two processes of one thread beat one process of two: small kernels do not fill two threads.
RANKS = ("--nproc", "2")
FAMILIES = "move,count,leftright,occlusion,collide,camera"
WORLD = ("--families", FAMILIES, "--frames", "9", "--size", "16x16")
PROMPTS = (
    "a red circle moves left",
    "a blue square moves up",
    "a green circle left of a red square",
    "a yellow square right of a purple circle",
)
# What a small model can learn in minutes; the VAE sees all families.
LEARNED = "family in ('move', 'leftright')"
# Scores whose interval must clear what a clip reaches that ignores just this word.
PLACE_AND_MOTION = (("move", "direction"), ("leftright", "relation"))


@dataclass(frozen=True)
class Phase:
    title: str
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    title: str
    wall: float  # seconds
    cpu: float  # seconds, all children


@dataclass(frozen=True)
class Gate:
    """One bar of the demo: `value` must not lie on the wrong side of `bar`."""

    title: str
    value: float
    bar: float
    is_upper: bool = False

    @property
    def is_met(self) -> bool:
        return self.value <= self.bar if self.is_upper else self.value >= self.bar


def phases(out: Path, clips: Path | None) -> list[Phase]:
    """The commands of the demo, in order; `clips` is a folder of videos with captions.jsonl."""
    world, latents, vae, dit = out / "world", out / "latents", out / "vae", out / "dit"
    steps = [
        (
            "world, train",
            ("world", f"{world}/train", "--clips", "9000", "--split", "train", *WORLD),
        ),
        ("world, val", ("world", f"{world}/val", "--clips", "1200", "--split", "val", *WORLD)),
        (
            "train the VAE",
            ("train", *RANKS, "experiment=demo_vae", f"output_dir={vae}", *paths(world)),
        ),
        (
            "encode, train",
            ("encode", f"{vae}", f"{world}/train", f"{latents}/train", "--where", LEARNED),
        ),
        (
            "encode, val",
            ("encode", f"{vae}", f"{world}/val", f"{latents}/val", "--where", LEARNED)
            + ("--stats-from", f"{latents}/train"),
        ),
        (
            "train the DiT",
            ("train", *RANKS, "experiment=demo_dit", f"output_dir={dit}", *paths(latents)),
        ),
        ("export", ("export", f"{dit}", f"{out}/pipeline", "--overwrite")),
        ("sample", ("sample", f"{dit}", *PROMPTS, "--out", f"{out}/samples")),
        (
            "evaluate",
            ("evaluate", f"{dit}", "--out", f"{scores(out)}", "--families", "move,leftright")
            + ("--prompts", "128", "--splits", "val", "--tasks", "t2v", "--weights", "ema"),
        ),
        ("report", ("report", f"{dit}", "--vae-run", f"{vae}", "--out", f"{out}/report.html")),
    ]
    if clips is not None and not (out / "packed").exists():  # it appears when it is complete
        steps.insert(2, ("pack real clips", ("pack", f"{clips}", f"{out}/packed")))
    return [Phase(title, argv) for title, argv in steps]


def scores(out: Path) -> Path:
    """Folder of the demo's evaluation, where the report looks for it."""
    return out / "dit" / "evaluation" / "val"


def paths(root: Path) -> tuple[str, str]:
    """Overrides that read shards from `root`/train and `root`/val."""
    return f"data.train.0.path={root}/train", f"data.val.0.path={root}/val"


def run_phase(phase: Phase, console: Console) -> Timing:
    """Run one command with this terminal; SystemExit with its exit code when it fails."""
    console.rule(f"[bold]{phase.title}")
    console.print(
        f"longtake {shlex.join(phase.argv)}", style="dim", soft_wrap=True, highlight=False
    )
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    code = subprocess.run((sys.executable, "-m", "longtake.launch.cli", *phase.argv)).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code != 0:
        console.print(f"demo: '{phase.title}' failed with exit code {code}", style="bold red")
        raise SystemExit(code)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timing(phase.title, time.monotonic() - start, cpu)


def gates(out: Path) -> list[Gate]:
    """What the demo promises, read from what its runs wrote."""
    psnr = values(out / "vae", "val/psnr_ema")
    losses = values(out / "dit", "val/loss_ema") or [float("nan")]
    card = json.loads((scores(out) / "card.json").read_text(encoding="utf-8"))
    by_name: dict[tuple[str, str], dict[str, Any]] = {
        (score["family"], score["name"]): score for score in card["scores"]
    }
    clears = max(by_name[key]["low"] - by_name[key]["blind"] for key in PLACE_AND_MOTION)
    colour = by_name["move", "colour"]["score"]
    return [
        Gate("VAE: validation PSNR, dB", psnr[-1], 25.0),
        Gate("DiT: validation loss, last / first", losses[-1] / losses[0], 0.6, is_upper=True),
        Gate("samples: colour of the moving shape", colour, 0.7),
        Gate("samples: direction or left/right, interval above blind by", clears, 0.05),
    ]


def values(run: Path, name: str) -> list[float]:
    """All values of one metric, oldest first, as the run's last attempts wrote them."""
    rows: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if name in row:
            rows[row["step"]] = row[name]
    return [rows[step] for step in sorted(rows)]


def print_closing(timings: list[Timing], met: list[Gate], console: Console) -> None:
    """The closing tables: time of each phase, and what was promised beside what came out."""
    table = Table(title="time", title_justify="left", show_footer=True)
    table.add_column("phase", footer="all")
    table.add_column("wall", justify="right", footer=clock(sum(t.wall for t in timings)))
    table.add_column("CPU", justify="right", footer=clock(sum(t.cpu for t in timings)))
    for timing in timings:
        table.add_row(timing.title, clock(timing.wall), clock(timing.cpu))
    console.print(table)
    table = Table(title="what was learned", title_justify="left")
    for name, justify in (("bar", "left"), ("wanted", "right"), ("reached", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for gate in met:
        sign = "≤" if gate.is_upper else "≥"
        verdict = "[green]met" if gate.is_met else "[bold red]missed"
        table.add_row(gate.title, f"{sign} {gate.bar:.2f}", f"{gate.value:.2f}", verdict)
    console.print(table)


def clock(seconds: float) -> str:
    """`3:07` for 187 seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def main() -> int:
    """Run all phases and check the bars; exit code 1 when one is missed."""
    parser = argparse.ArgumentParser(prog="longtake.launch.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--clips", type=Path, default=Path("../shared/videos"), help="folder with captions.jsonl"
    )
    args = parser.parse_args()
    console = Console()
    clips = args.clips if (args.clips / "captions.jsonl").exists() else None
    if clips is None:
        console.print(f"no {args.clips}/captions.jsonl: the demo packs no real clips")
    timings = [run_phase(phase, console) for phase in phases(args.out, clips)]
    met = gates(args.out)
    print_closing(timings, met, console)
    console.print(f"report   {args.out}/report.html\nsamples  {args.out}/samples")
    console.print(f"pipeline {args.out}/pipeline (a stock diffusers WanPipeline)")
    return 0 if all(gate.is_met for gate in met) else 1


if __name__ == "__main__":
    sys.exit(main())
