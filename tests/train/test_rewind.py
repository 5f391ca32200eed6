"""A NaN or a jump in the loss costs the run its samples, and nothing else."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.data.loader import Batch
from longtake.train import checkpoint
from longtake.train.health import LossWatch
from longtake.train.run_folder import read_marker
from longtake.train.tasks import LossSum
from longtake.train.vae_task import VAETask
from tests.train.forked import run_ranks
from tests.train.tiny_runs import TINY_VAE, losses, options, train_here, train_on_rank, write_clips

SETTINGS = (
    *("train.steps=24", "optim.schedule=constant", "data.max_bad_fraction=0.9"),
    *("train.loss_jump=20", "engine.precision=fp32"),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_clips(folder / "train", 16)
    write_clips(folder / "val", 4, "val")
    return folder


def settings(shards: Path, folder: Path, *more: str) -> list[str]:
    return options(shards, folder, *SETTINGS, *more, task=TINY_VAE)


def plant(patch: pytest.MonkeyPatch, factor: float, step: int, slot: int) -> None:
    """Multiply the loss of one micro-batch, whenever it is computed from the samples it has now."""
    honest = VAETask.loss
    poisoned: set[int] = set()

    def loss(self: VAETask, engine: Any, batch: Batch) -> LossSum:
        found = honest(self, engine, batch)
        if (batch.step, batch.slot) == (step, slot) and not poisoned:
            poisoned.update(sample.sample_id for sample in batch.samples)
        if (batch.step, batch.slot) == (step, slot) and poisoned & {
            sample.sample_id for sample in batch.samples
        }:
            return LossSum(found.total * factor, found.parts)
        return found

    patch.setattr(VAETask, "loss", loss)


def train_planted(ranks: Any, overrides: list[str], factor: float, step: int, slot: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, factor, step, slot)
        return train_on_rank(ranks, overrides)


def quarantined(folder: Path) -> list[dict]:
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.find_last_good(folder / "checkpoints")
    assert path is not None
    return checkpoint.load_full(path, "param")


def test_a_nan_skips_the_step_and_its_samples(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, math.nan, step=5, slot=2)
    folder = shards / "nan"
    assert train_here(settings(shards, folder)) == 0
    rows = quarantined(folder)
    assert len(rows) == 2 and {row["from_step"] for row in rows} == {6}
    assert all("not finite at step 6" in row["reason"] for row in rows)
    assert read_marker(folder) == "FINISHED"
    assert all(tensor.isfinite().all() for tensor in weights_of(folder).values())
    found = losses(folder)
    assert found[6] is None and all(math.isfinite(found[step]) for step in range(7, 25))


def test_a_jump_rewinds_and_leaves_its_samples_out(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, 1e4, step=18, slot=1)
    folder = shards / "jump"
    assert train_here(settings(shards, folder)) == 0
    said = capsys.readouterr().out
    assert (
        "loss jumped to" in said and "2 samples are left out" in said and "back at step 16" in said
    )
    rows = quarantined(folder)
    assert len(rows) == 2 and {row["from_step"] for row in rows} == {18}
    assert max(losses(folder).values()) < 1 and read_marker(folder) == "FINISHED"


def test_without_a_checkpoint_it_says_so_and_goes_on(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, 1e4, step=14, slot=0)
    folder = shards / "early"
    assert train_here(settings(shards, folder, "train.checkpoint_every=0")) == 0
    assert "no checkpoint to go back to" in capsys.readouterr().out


def test_too_many_rewinds_fail_the_run(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, 1e4, step=18, slot=1)
    folder = shards / "failed"
    assert train_here(settings(shards, folder, "train.max_rewinds=0")) == 1
    assert read_marker(folder) == "FAILED"


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero2"])
def test_two_ranks_agree_on_both(shards: Path, strategy: str) -> None:
    for name, factor in (("nan", math.nan), ("jump", 1e4)):
        folder = shards / f"{strategy}-{name}"
        overrides = settings(shards, folder, f"engine={strategy}")
        run_ranks(2, train_planted, overrides, factor, 18, 3)
        assert read_marker(folder) == "FINISHED" and len(quarantined(folder)) == 2


def test_the_watch_judges_by_the_median() -> None:
    watch = LossWatch(5.0)
    assert not any(watch.jumped(value) for value in (1e6, *[1.0] * 20))  # too early to judge
    assert watch.jumped(5.1) and watch.jumped(5.1) and not watch.jumped(4.9)
