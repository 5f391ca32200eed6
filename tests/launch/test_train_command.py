"""`longtake train` on one and two processes: exit codes, resume, signals passed on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longtake.data.world import Shapes, write_world

SMALL = (
    *("experiment=nano_identity", "tracking=jsonl", "train.device=cpu", "engine.precision=fp32"),
    *("train.val_every=0", "train.sample_every=0", "train.num_threads=1", "train.log_every=1"),
    *("model.hidden_size=24", "model.num_heads=2", "model.depth=1", "model.ffn_dim=32"),
    *("model.text_dim=16", "text.d_model=16", "text.num_layers=1", "text.num_heads=2"),
    *("text.d_ff=32", "validation.num_samples=2"),
    "data.buckets=[{frames: 8, height: 16, width: 16, batch_size: 2}]",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(
        *(out,),
        families=("move",),
        num_clips=16,
        shapes=Shapes(((16, 16),), (8,)),
        num_workers=1,
        progress=False,
    )
    return out


def command(world: Path, out: Path, *more: str) -> list[str]:
    paths = (f"data.train.0.path={world}", f"data.val.0.path={world}", f"output_dir={out}")
    return [sys.executable, "-m", "longtake.launch.cli", "train", *SMALL, *paths, *more]


def test_one_process_finishes(world: Path, tmp_path: Path) -> None:
    argv = command(world, tmp_path / "run", "train.steps=2")
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "FINISHED").exists()


def test_a_missing_folder_is_code_1(world: Path, tmp_path: Path) -> None:
    argv = command(tmp_path / "absent", tmp_path / "run", "train.steps=2")
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert "absent" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.dist
def test_two_processes_are_preempted_and_go_on(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = command(world, out, "train.steps=100000", "--nproc", "2")
    with subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 240
        rows = out / "metrics.jsonl"
        while not (rows.exists() and rows.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=240) == 75
    assert (out / "PREEMPTED").exists()
    steps = [path.name for path in (out / "checkpoints").iterdir()]
    assert len(steps) == 1
    last = int(steps[0].removeprefix("step-"))
    argv = command(world, out, f"train.steps={last + 2}", "--nproc", "2", "resume=force")
    assert subprocess.run(argv, timeout=300).returncode == 0
    assert (out / "FINISHED").exists() and not (out / "PREEMPTED").exists()
