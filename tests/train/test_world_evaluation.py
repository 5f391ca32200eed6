"""World scores inside training: the card in the rows, a budget, ranks and partitioned weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.forked import import_before_fork, run_ranks
from tests.train.tiny_runs import options, train_here, train_on_rank

EVALUATION = (
    *("train.steps=2", "train.val_every=0", "train.sample_every=0", "train.checkpoint_every=0"),
    *("evaluation.every=1", "evaluation.families=[move,leftright]", "evaluation.num_prompts=3"),
    *("evaluation.num_pairs=1", "evaluation.batch_size=3", "samples.steps=2"),
)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "eval/clips" in row]


def test_every_step_has_its_card(shards: Path, tmp_path: Path) -> None:
    assert train_here(options(shards, tmp_path, *EVALUATION)) == 0
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [0, 1, 2]
    for row in found:
        assert row["eval/clips"] == 3 and "card.mean" in row
        assert 0 <= row["eval/t2v/val/move/colour"] <= 1
        assert "eval/t2v/val/leftright/relation" in row
        assert "eval/t2v/val/move/pair_flip" in row


def test_tasks_that_short_buckets_do_not_fit_are_evaluated(shards: Path, tmp_path: Path) -> None:
    sides = "height:16,width:16,batch_size:2"
    mixed = f"data.buckets=[{{frames:1,{sides},optional:true}}, {{frames:5,{sides}}}]"
    tasks = "tasks={t2v: 1, t2i: 1, i2v: 1, join: 1}"
    few = "evaluation.num_prompts=1", "evaluation.num_pairs=0", "train.steps=1"
    assert train_here(options(shards, tmp_path, *EVALUATION, *few, mixed, tasks)) == 0
    for task in ("t2v", "i2v", "join"):  # whatever moves: none of it is asked of one frame
        assert f"eval/{task}/val/move/direction" in rows(tmp_path)[0]
    assert "eval/t2i/val/move/colour" in rows(tmp_path)[0]


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["ddp", "deepspeed_zero3"])
def test_two_ranks_see_the_card_of_one(engine: str, shards: Path, tmp_path: Path) -> None:
    """Five prompts of one family leave the ranks unequal shares."""
    uneven = ("evaluation.families=[move]", "evaluation.num_prompts=5", "evaluation.batch_size=1")
    alone = options(shards, tmp_path / "alone", *EVALUATION, *uneven, "engine.precision=fp32")
    assert train_here(alone) == 0
    import_before_fork()
    together = options(
        shards, tmp_path / "two", *EVALUATION, *uneven, f"engine={engine}", "engine.precision=fp32"
    )
    assert run_ranks(2, train_on_rank, together) == [0, 0]
    assert rows(tmp_path / "two")[0] == rows(tmp_path / "alone")[0]  # the same initial weights
    assert len(rows(tmp_path / "two")) == 3


def test_a_small_budget_draws_less(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))  # a round takes one tick, and one more is asked for in between
    monkeypatch.setattr("longtake.train.world_evaluation.monotonic", lambda: next(clock))
    budget = ("evaluation.seconds=4", "evaluation.num_pairs=0", "evaluation.batch_size=2")
    budget = (*budget, "train.checkpoint_every=2")
    assert train_here(options(shards, tmp_path, *EVALUATION, *budget)) == 0
    assert {row["eval/clips"] for row in rows(tmp_path)} == {2.0}  # every time, of every family
    monkeypatch.setattr("longtake.train.world_evaluation.monotonic", lambda: 0)
    more = *EVALUATION, *budget, "train.steps=4", "resume=force"
    assert train_here(options(shards, tmp_path, *more)) == 0
    last = rows(tmp_path)[-1]  # has all the time that it wants, and asks what was asked before
    assert last["step"] == 4 and last["eval/clips"] == 2.0


def test_evaluation_does_not_change_the_training(shards: Path, tmp_path: Path) -> None:
    def losses(folder: Path) -> list[float]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in lines if "loss" in row]

    assert train_here(options(shards, tmp_path / "with", *EVALUATION)) == 0
    without = options(shards, tmp_path / "without", *EVALUATION, "evaluation.every=0")
    assert train_here(without) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without") and not rows(
        tmp_path / "without"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.families=[]", "evaluation.every=1 needs evaluation.families"),
        ("evaluation.families=[candel]", "candel is unknown"),
        ("evaluation.seconds=0", "evaluation.seconds=0"),
        ("evaluation.captions=poem", "captions poem"),
        ("evaluation.captions=vague", "captions vague"),
    ],
)
def test_mistakes_stop_the_run_at_its_start(
    override: str, message: str, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_here(options(shards, tmp_path / "run", *EVALUATION, override)) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
