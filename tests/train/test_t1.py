"""Tier T1: two gloo ranks learn colour from real shards, though the run is killed in the middle."""

import json
from pathlib import Path

import pytest

from longtake.train.run_folder import read_marker
from tests.train.learning import TORCHRUN, card_of, nano_command, score_of, write_shards
from tests.train.tiny_runs import kill_group, kill_or_leave, losses, start_command, wait_for

STEPS, KILLED_AFTER = 500, 230


@pytest.mark.dist
@pytest.mark.timeout(1800)  # minutes on an idle machine; a busy one is no defect
def test_two_ranks_learn_colour_through_a_kill(tmp_path: Path) -> None:
    shards, run = tmp_path / "world", tmp_path / "run"
    write_shards(shards, ["move"], 2000, 128)
    command = nano_command(
        *(shards, run, f"train.steps={STEPS}", "train.log_every=1", "train.val_every=250"),
        "train.checkpoint_every=100",
    )
    first = start_command(command, *TORCHRUN, cwd=tmp_path)
    wait_for(lambda: len(losses(run)) > KILLED_AFTER, first, 900)
    kill_group(first)
    first.wait()
    killed = losses(run)
    assert max(killed) < STEPS

    second = start_command(command, *TORCHRUN, cwd=tmp_path)
    try:
        output, _ = second.communicate(timeout=900)
    finally:
        kill_or_leave(second)
    assert second.returncode == 0, output
    assert read_marker(run) == "FINISHED"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    resumed = {row["step"]: row["loss"] for row in rows if row["attempt"] == 2 and "loss" in row}
    assert min(resumed) == max(killed) // 100 * 100 + 1
    again = killed.keys() & resumed.keys()
    assert len(again) >= 2
    assert {step: resumed[step] for step in again} == {step: killed[step] for step in again}

    validation = losses(run, "val/loss_ema")
    assert validation[STEPS] < 0.6 * validation[0]
    colour = score_of(card_of(run, num_prompts=64), "move", "colour")
    assert colour.score >= 0.75, f"colour {colour.score:.2f} ({colour.low:.2f}..{colour.high:.2f})"
