"""The proof's commands are ones that longtake knows, and a bar that is missed is not met."""

import json
from pathlib import Path

import numpy as np
import pytest

from longtake.launch.cli import parse
from longtake.launch.compose import compose
from longtake.train.report_curves import read_series
from longtake.train.tasks import Drawing
from longtake.train.trainer import write_drawings
from tests.proof.pictures import draw_curves, draw_reconstructions
from tests.proof.proof_vae import (
    measured,
    real_gates,
    real_phases,
    run_of,
    world_gates,
    world_phases,
)


def test_every_phase_is_a_command_that_runs_alone(tmp_path: Path) -> None:
    phases = world_phases(tmp_path) + real_phases(tmp_path, Path("videos"))
    for phase in phases:
        args = parse(list(phase.argv))
        if args.command.name == "train":
            config = compose(args.overrides)
            assert config.stage == "vae" and Path(config.output_dir) == run_of(phase)
    assert [phase.argv[0] for phase in real_phases(tmp_path, None)] == [
        *("world", "world", "train", "train")
    ]


def write_metrics(run: Path, rows: list[dict[str, float]]) -> None:
    run.mkdir()
    lines = [json.dumps({"attempt": 1, **row}) + "\n" for row in rows]
    (run / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def test_the_hardest_scorer_decides_over_its_families(tmp_path: Path) -> None:
    last = {"val/world/move/colour_ema": 1.0, "val/world/count/colour_ema": 0.9}
    last |= {"val/world/move/shape_ema": 0.98, "val/world/move/shape/17x64x64_ema": 0.1}
    row = {"val/psnr_ema": 20.0, "val/ssim_ema": 0.5}
    write_metrics(tmp_path / "run", [{"step": 0, **row}, {"step": 5, **row, **last}])
    found = measured(tmp_path / "run")
    assert found["scores"] == {"colour": 0.95, "shape": 0.98}
    found["cpu_minutes"] = {"images": 1.0, "clips": 40.0}
    met = world_gates(found)
    assert [gate.is_met for gate in met] == [False, False, False]
    assert met[-1].title.endswith("colour") and met[-1].value == 0.95
    curve = read_series(tmp_path / "run")["val/psnr_ema"]
    draw_curves({"clips": curve}, tmp_path / "curves.png", "validation PSNR, dB")
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert not real_gates(found)[0].is_met  # a curve that stands still


def test_a_picture_of_the_last_drawings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no drawing"):
        draw_reconstructions(tmp_path, tmp_path / "picture.png")
    triple = np.random.default_rng(0).integers(0, 255, (5, 16, 48, 3), np.uint8)
    drawings = [Drawing(f"reconstruction-{i:02d}", triple, 8.0, "noise") for i in range(2)]
    write_drawings(tmp_path / "step-00000005", drawings)
    draw_reconstructions(tmp_path, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
