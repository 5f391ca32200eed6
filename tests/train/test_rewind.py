"""A NaN or a jump in the loss costs the run its samples, and nothing else."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.data.loader import Batch
from longtake.train import checkpoint
from longtake.train.health import LossWatch, NormWatch
from longtake.train.run_folder import read_marker
from longtake.train.tasks import LossSum
from longtake.train.vae_task import VAETask
from tests.train.forked import run_ranks
from tests.train.tiny_runs import TINY_VAE, losses, options, train_here, train_on_rank

SETTINGS = (
    *("train.steps=24", "optim.schedule=constant", "data.max_bad_fraction=0.9"),
    *("train.loss_jump=20", "engine.precision=fp32"),
)

# Everything a run remembers besides tensors: what is not here is lost by a resume.
STATE = {
    *("step", "samples_seen", "data_hash", "losses", "exclusions", "spikes", "adversary", "plan"),
    *("useful_seconds", "rounds"),
}


def settings(shards: Path, folder: Path, *more: str) -> list[str]:
    return options(shards, folder, *SETTINGS, *more, task=TINY_VAE)


def plant(
    patch: pytest.MonkeyPatch, factor: float, step: int, slot: int, num_steps: int = 1
) -> None:
    """Multiply the loss of one micro-batch of each of some steps, whenever it is computed from the
    samples it has now."""
    honest = VAETask.loss
    poisoned: dict[int, set[int]] = {}

    def loss(self: VAETask, engine: Any, batch: Batch) -> LossSum:
        found = honest(self, engine, batch)
        if batch.slot == slot and step <= batch.step < step + num_steps:
            samples = {sample.sample_id for sample in batch.samples}
            if samples & poisoned.setdefault(batch.step, samples):
                return LossSum(found.total * factor, found.parts)
        return found

    patch.setattr(VAETask, "loss", loss)


def train_planted(ranks: Any, overrides: list[str], *planted: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, *planted)
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
    assert len(rows) == 2 and {row["from_step"] for row in rows} == {7}
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
    assert [row["from_step"] for row in rows] == [18, 18, 16, 16]  # from the checkpoint on
    assert len({row["sample_id"] for row in rows}) == 2
    assert max(losses(folder).values()) < 1 and read_marker(folder) == "FINISHED"


def test_the_first_loss_that_is_judged_has_a_checkpoint_behind_it(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, 1e4, step=10, slot=0)
    folder = shards / "first"
    assert train_here(settings(shards, folder, "train.checkpoint_every=100")) == 0
    assert "back at step 10" in capsys.readouterr().out
    assert max(losses(folder).values()) < 1 and read_marker(folder) == "FINISHED"
    assert [step for step, _ in checkpoint.list_steps(folder / "checkpoints")] == [24, 10]


def test_a_term_that_begins_is_no_jump(shards: Path) -> None:
    folder = shards / "late"
    late = "loss.flicker={weight: 500, start: 17}"
    assert train_here(settings(shards, folder, "train.loss_jump=5", late)) == 0
    found = losses(folder)
    assert found[18] > 5 * found[17] and not (folder / "quarantine.jsonl").exists()


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
    cases = {"nan": (math.nan, 18, 3), "jump": (1e4, 18, 3), "skips": (math.nan, 17, 3, 2)}
    for name, planted in cases.items():
        folder = shards / f"{strategy}-{name}"
        overrides = settings(shards, folder, f"engine={strategy}", "train.max_skips=2")
        run_ranks(2, train_planted, overrides, *planted)
        left_out = {row["sample_id"] for row in quarantined(folder)}
        assert read_marker(folder) == "FINISHED"
        assert len(left_out) == (3 if name == "skips" else 2)  # one clip was there twice
        path = checkpoint.find_last_good(folder / "checkpoints")
        assert path is not None
        state = json.loads((path / "train_state.json").read_text())
        assert state.keys() == STATE
        spikes = state["spikes"]
        assert spikes["rewinds"] == (name != "nan") and spikes["skips"] == 0
        if name == "skips":  # steps 18 and 19 were skipped, then done again without those samples
            assert all(math.isfinite(losses(folder)[step]) for step in range(1, 25))


def test_clipping_follows_the_norms_but_not_their_spikes() -> None:
    norms = NormWatch(sigmas=3.0, fixed=10.0)
    for index in range(25):
        assert norms.limit == 10.0  # too early to judge
        norms.add(1.0 + 0.1 * (-1) ** index)
    assert norms.limit == pytest.approx(1.3, abs=0.02)  # mean 1, deviation 0.1
    before = norms.limit
    norms.add(1e6)
    assert before < norms.limit < 1.1 * before
    assert NormWatch(sigmas=0.0, fixed=2.0).limit == 2.0


def test_the_watch_judges_by_the_median() -> None:
    watch = LossWatch(5.0)
    assert not any(watch.jumped(value) for value in (1e6, *[1.0] * 20))  # too early to judge
    assert watch.jumped(5.1) and watch.jumped(5.1) and not watch.jumped(4.9)
