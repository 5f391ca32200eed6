"""`make proof`: VAEs learn the world and real clips on a CPU, by the product's own commands alone.

`python -m tests.proof.proof_vae [--corpus world|real] [--out runs/proof] [--docs docs/proof]` from
the repository root. A second call goes on where the first one stopped. What was reached is written
to `docs/proof/`, bars that were missed included; the exit code is 1 then.
"""

import argparse
import json
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from longtake.launch.demo import Gate, Phase, Timing, paths, print_closing, run_phase
from longtake.train.report_curves import read_series
from tests.proof.pictures import draw_curves, draw_reconstructions

FOLDER = "output_dir="
MIN_PSNR, MIN_SCORE, MAX_MINUTES, MIN_GAIN = 30.0, 0.97, 40.0, 1.0
WORLD = ("--size", "64x64", "--frames", "17")
HARD = {"attribute": 0.3, "grid": 0.15}
"""More clips of the families that are hardest to give back, to one of any family: only in
`attribute` are things dark or between hues, and `grid` has four small pictures in one."""
REAL_SIDE = 128
# Real clips are packed into parts; a source is either trained on or validated on, with all of them.
PACK = ("--recode", str(REAL_SIDE), "--max-duration", "2.5", "--min-duration", "0.8")
REAL = (
    *("data=clips", "data.num_workers=0", "data.decode_timeout=null", "data.flip=true"),
    *("validation.num_samples=24", "validation.score_share=0"),
)


def world_phases(out: Path) -> list[Phase]:
    """The world at 64x64, 17 frames, of all families: single frames, short clips, whole clips."""
    clips, images, short = out / "world_clips", out / "world_images", out / "world_short"
    made = {
        "train": ("--clips", "6600"),
        "val": ("--split", "val", "--clips", "220"),
    }
    sources = f"{{path: {clips}/train}}"
    for family, weight in HARD.items():
        count = str(round(9000 * weight))
        made[family] = ("--clips", count, "--families", family, "--seed", "1")
        sources += f", {{path: {clips}/{family}, weight: {weight}}}"
    data = f"data.train=[{sources}]", f"data.val.0.path={clips}/val"
    return [
        *(
            Phase(f"world, {name}", ("world", f"{clips}/{name}", *WORLD, *options))
            for name, options in made.items()
        ),
        train("world, single frames", "proof_vae_images", images, *data),
        train("world, 5 frames", "proof_vae_short", short, *data, f"init_from={images}"),
        train("world, 17 frames", "proof_vae", out / "world", *data, f"init_from={short}"),
    ]


def real_phases(out: Path, videos: Path | None) -> list[Phase]:
    """Real clips at 128 px by the first two of these parts; else generated ones."""
    if videos is None:
        shards = out / "stand_in"
        size = f"{REAL_SIDE}x{REAL_SIDE}"
        prepare = [
            Phase(
                f"stand-in, {split}",
                ("world", f"{shards}/{split}", "--split", split, "--size", size, "--clips", count),
            )
            for split, count in (("train", "220"), ("val", "24"))
        ]
        data = paths(shards)
    else:
        shards = out / "packed"
        pack = Phase("pack", ("pack", str(videos), str(shards), *PACK, "--val-fraction", "0.3"))
        prepare = [] if shards.exists() else [pack]  # it appears when it is complete
        data = tuple(
            option
            for name in ("train", "val")
            for option in (
                f"data.{name}.0.path={shards}",
                f"data.{name}.0.where=\"split = '{name}'\"",
            )
        )
    images = out / "real_images"
    still, moving = (
        f"data.buckets=[{{frames:{frames},height:{REAL_SIDE},width:{REAL_SIDE},batch_size:{size}}}]"
        for frames, size in ((1, 8), (5, 2))
    )
    return [
        *prepare,
        train(
            *("real, single frames", "proof_vae_images", images, *data, *REAL, still),
            *("train.steps=480", "train.val_every=120"),
        ),
        train(
            *("real, 5 frames", "proof_vae_short", out / "real", *data, *REAL, moving),
            *("train.steps=320", "train.val_every=80", "train.sample_every=320"),
            *("validation.num_videos=8", f"init_from={images}"),
        ),
    ]


def train(title: str, experiment: str, folder: Path, *more: str) -> Phase:
    """A training on the CPU, its processes of one thread each; all count in its CPU minutes."""
    options = f"experiment={experiment}", f"{FOLDER}{folder}", "train.num_threads=1"
    return Phase(title, ("train", *more, *options, "train.device=cpu"))


def run_of(phase: Phase) -> Path:
    """The run folder of a training."""
    return next(Path(w.removeprefix(FOLDER)) for w in phase.argv if w.startswith(FOLDER))


def run_counted(phase: Phase, ledger: Path, console: Console) -> Timing:
    """Run a phase; its time is added to what earlier calls spent on it, failed ones included."""
    spent: dict[str, list[float]] = json.loads(ledger.read_text()) if ledger.exists() else {}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    try:
        run_phase(phase, console)
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        wall, already = spent.get(phase.title, [0.0, 0.0])
        spent[phase.title] = [wall + time.monotonic() - start, already + cpu]
        ledger.write_text(json.dumps(spent))
    return Timing(phase.title, *spent[phase.title])


def measured(run: Path) -> dict[str, Any]:
    """What the last validation of a run says of its EMA weights, and how it came there."""
    series = read_series(run)
    psnr = series["val/psnr_ema"]
    of_scorer: defaultdict[str, list[float]] = defaultdict(list)
    for name, found in series.items():
        parts = name.removesuffix("_ema").split("/")
        if name.startswith("val/world/") and name.endswith("_ema") and len(parts) == 4:
            of_scorer[parts[3]].append(found.values[-1])
    scores = {name: round(fmean(values), 4) for name, values in sorted(of_scorer.items())}
    return {
        "psnr": round(psnr.values[-1], 2),
        "steps": psnr.steps[-1],
        "psnr_by_step": dict(zip(psnr.steps, (round(v, 2) for v in psnr.values), strict=True)),
        "ssim": round(series["val/ssim_ema"].values[-1], 4),
    } | ({"scores": scores} if scores else {})  # the mean over its families of each scorer


def world_gates(found: dict[str, Any]) -> list[Gate]:
    """What is asked of a VAE that has seen the world."""
    scores, minutes = found["scores"], sum(found["cpu_minutes"].values())
    lowest = min(scores, key=scores.__getitem__)
    return [
        Gate("world: CPU minutes of training", minutes, MAX_MINUTES, is_upper=True),
        Gate("world: validation PSNR, dB", found["psnr"], MIN_PSNR),
        Gate(f"world: lowest scorer on reconstructions, {lowest}", scores[lowest], MIN_SCORE),
    ]


def real_gates(found: dict[str, Any]) -> list[Gate]:
    """What is asked of a VAE that has seen real clips."""
    curve = list(found["psnr_by_step"].values())
    return [
        Gate("real: PSNR gained since the first validation, dB", curve[-1] - curve[0], MIN_GAIN)
    ]


def prove(corpus: str, out: Path, docs: Path, videos: Path | None, console: Console) -> list[Gate]:
    """Run what is missing of one corpus, write what was reached."""
    phases = world_phases(out) if corpus == "world" else real_phases(out, videos)
    ledger = out / f"{corpus}_seconds.json"
    timings = [run_counted(phase, ledger, console) for phase in phases]
    found = measured(out / corpus)
    found["cpu_minutes"] = {
        timing.title: round(timing.cpu / 60, 1)
        for phase, timing in zip(phases, timings, strict=True)
        if phase.argv[0] == "train"
    }
    if corpus == "real":
        found["clips"] = "generated stand-in" if videos is None else "real"
    met = (world_gates if corpus == "world" else real_gates)(found)
    write_found(found, met, docs / f"vae_{corpus}.json")
    parts = {phase.title: run_of(phase) for phase in phases if phase.argv[0] == "train"}
    curves = {title: read_series(run)["val/psnr_ema"] for title, run in parts.items()}
    draw_curves(curves, docs / f"vae_{corpus}_curves.png", "validation PSNR, dB")
    draw_reconstructions(out / corpus / "samples", docs / f"vae_{corpus}.png")
    print_closing(timings, met, console)
    return met


def write_found(found: dict[str, Any], met: list[Gate], path: Path) -> None:
    """What a proof found and the bars it was held to, as JSON."""
    bars = [
        {"bar": gate.title, "wanted": gate.bar, "reached": gate.value, "met": gate.is_met}
        for gate in met
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**found, "bars": bars}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Run all phases, write what was reached; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="tests.proof.proof_vae", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--docs", type=Path, default=Path("docs/proof"))
    parser.add_argument("--corpus", choices=("world", "real"), help="(default: both)")
    parser.add_argument(
        "--videos", type=Path, default=Path("../shared/videos"), help="folder with captions.jsonl"
    )
    args = parser.parse_args()
    console = Console()
    videos = args.videos if (args.videos / "captions.jsonl").exists() else None
    if videos is None:
        console.print(f"no {args.videos}/captions.jsonl: generated clips stand in for real ones")
    args.out.mkdir(parents=True, exist_ok=True)
    met = [
        gate
        for corpus in ([args.corpus] if args.corpus else ("world", "real"))
        for gate in prove(corpus, args.out, args.docs, videos, console)
    ]
    return 0 if all(gate.is_met for gate in met) else 1


if __name__ == "__main__":
    sys.exit(main())
