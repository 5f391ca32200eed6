"""Long proof: SIGKILL at random moments costs nothing, whatever was going on."""

import random
import subprocess
from pathlib import Path

import pytest
import torch

from longtake.train.checkpoint import find_last_good, load_full
from longtake.train.run_folder import read_marker
from tests.train.tiny_runs import (
    kill_group,
    losses,
    options,
    start_command,
    train_here,
    write_clips,
)

NUM_KILLS = 12
STEPS = 120


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = find_last_good(folder / "checkpoints")
    assert last is not None and last.name == f"step-{STEPS:08d}"
    return load_full(last, "ema") | {f"raw.{k}": v for k, v in load_full(last, "param").items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_random_moments_change_no_bit(tmp_path: Path) -> None:
    write_clips(tmp_path / "train", 40)
    write_clips(tmp_path / "val", 8, "val")
    more = f"train.steps={STEPS}", "train.checkpoint_every=5", "train.val_every=10"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_here(options(tmp_path, whole, *more)) == 0

    command = options(tmp_path, killed, *more)
    chance = random.Random(0)
    reached = []
    for _ in range(NUM_KILLS):
        process = start_command(command, cwd=tmp_path)
        before = max(losses(killed), default=0) if (killed / "metrics.jsonl").exists() else 0
        while process.poll() is None:  # not before it trains: then somewhere in the next steps
            rows = losses(killed) if (killed / "metrics.jsonl").exists() else {}
            if max(rows, default=0) > before:
                break
        try:
            process.wait(chance.uniform(0.0, 0.3))
        except subprocess.TimeoutExpired:
            kill_group(process)
            process.wait()
        reached.append(max(losses(killed)))
    assert reached[0] < STEPS, "the first kill came too late to mean anything"
    assert train_here(command) == 0
    assert read_marker(killed) == "FINISHED"
    assert losses(killed) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(killed).items())
