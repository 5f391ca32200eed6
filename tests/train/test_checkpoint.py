"""Checkpoints: what is written is read, and the last ones are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.train import checkpoint
from longtake.train.checkpoint import (
    Keep,
    find_last_good,
    load_full,
    load_into,
    save,
)
from longtake.train.engine import Engine, EngineConfig, Ranks, single_process
from tests.train import tiny
from tests.train.forked import import_before_fork, run_ranks
from tests.train.tiny_checkpoints import CONFIG, damage_flipped_byte, make, save_steps, steps_in


@pytest.fixture(scope="module", autouse=True)
def slow_imports() -> None:
    import_before_fork()


# Written and read (across strategies: test_elastic_state.py)


def train_and_save(ranks: Ranks, folder: str) -> dict[str, Any]:
    engine, ema = make(ranks)
    tiny.train(engine, range(3), ema=ema)
    path = save(Path(folder), 3, engine, ema, {"step": 3, "samples_seen": 33}, CONFIG)
    assert path.name == "step-00000003"
    state = tiny.full_state(engine, ema)
    history = tiny.train(engine, range(3, 6), ema=ema)
    return {"state": state, "history": history, "end": tiny.full_state(engine, ema)}


def load_and_train(ranks: Ranks, folder: str) -> dict[str, Any]:
    engine, ema = make(ranks)
    tiny.train(engine, range(7, 9), ema=ema)  # what was there before must not matter
    path = find_last_good(Path(folder), ranks)
    assert path is not None
    train_state = load_into(path, engine, ema)
    assert train_state == {"step": 3, "samples_seen": 33}
    assert engine.optimizer_steps == 3
    state = tiny.full_state(engine, ema)
    history = tiny.train(engine, range(3, 6), ema=ema)
    return {"state": state, "history": history, "end": tiny.full_state(engine, ema)}


def save_untrained(ranks: Ranks, folder: str) -> None:
    engine, ema = make(ranks)
    save(Path(folder), 0, engine, ema, {}, CONFIG)


def load_untrained(ranks: Ranks, folder: str) -> bool:
    engine, ema = make(ranks)
    before = tiny.full_state(engine, ema)
    tiny.train(engine, range(1), ema=ema)
    path = find_last_good(Path(folder), ranks)
    assert path is not None
    load_into(path, engine, ema)
    return tiny.full_state(engine, ema) == before


@pytest.mark.dist
def test_numbers_of_ranks_need_not_divide(tmp_path: Path) -> None:
    run_ranks(3, save_untrained, str(tmp_path))
    assert run_ranks(2, load_untrained, str(tmp_path)) == [True, True]


def test_one_rank_resumes_bit_for_bit(tmp_path: Path) -> None:
    written = train_and_save(single_process(), str(tmp_path))
    assert load_and_train(single_process(), str(tmp_path)) == written


def test_a_checkpoint_is_what_the_manifest_says(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 2))
    folder = tmp_path / "step-00000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", *manifest["files"]}
    assert set(manifest["files"]) == {
        "rank-00000.safetensors",
        "train_state.json",
        "config.json",
    }
    assert (manifest["step"], manifest["samples_seen"]) == (1, 11)
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    entry = manifest["tensors"]["exp_avg"]["first.weight"]
    assert (entry["dtype"], entry["shape"]) == ("float32", [13, 7])
    assert [place[2:] for place in entry["ranges"]] == [[0, 91]]
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001"}


def test_tools_get_whole_state_dicts(tmp_path: Path) -> None:
    engine, ema = save_steps(tmp_path, range(1, 3))
    path = find_last_good(tmp_path)
    assert path is not None
    assert path.name == "step-00000002"
    fresh = tiny.Tiny()
    fresh.load_state_dict(load_full(path, kind="param"), strict=True)
    for name, tensor in engine.module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    with ema.swapped(engine):
        fresh.load_state_dict(load_full(path), strict=True)
        for name, tensor in engine.module.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="kind=exp_avg must be ema or param"):
        load_full(path, kind="exp_avg")


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 2))
    config = EngineConfig("ddp", 0, "fp32", "none")
    other = Engine(torch.nn.Linear(7, 13), tiny.OPTIM, config, single_process())
    with pytest.raises(ValueError, match="weight is missing in the checkpoint"):
        load_into(tmp_path / "step-00000001", other, None)


def test_a_checkpoint_without_mean_starts_it_from_the_parameters(tmp_path: Path) -> None:
    engine, _ = save_steps(tmp_path, range(0))
    tiny.train(engine, range(2))
    path = save(tmp_path, 2, engine, None, {}, CONFIG)
    other, ema = make(single_process())
    load_into(path, other, ema)
    state = tiny.full_state(other, ema)
    assert state["ema first.weight"] == state["param first.weight"]
    assert load_full(path, kind="ema").keys() == engine.module.state_dict().keys()


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 6), keep_last=2)
    assert steps_in(tmp_path) == [4, 5]


def test_nothing_is_deleted_when_the_new_one_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, ema = save_steps(tmp_path, range(1, 3), keep_last=1)
    assert steps_in(tmp_path) == [2]
    put_in_place = checkpoint.put_in_place

    def put_damaged(unfinished: Path, final: Path) -> None:
        damage_flipped_byte(unfinished)
        put_in_place(unfinished, final)

    monkeypatch.setattr(checkpoint, "put_in_place", put_damaged)
    save(tmp_path, 3, engine, ema, {}, CONFIG, keep=Keep(1))
    assert steps_in(tmp_path) == [2, 3]
    assert "older checkpoints stay" in caplog.text
    assert find_last_good(tmp_path) == tmp_path / "step-00000002"


def test_a_damaged_later_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    engine, ema = save_steps(tmp_path, range(1, 4))
    damage_flipped_byte(tmp_path / "step-00000003")
    save(tmp_path, 2, engine, ema, {"again": True}, CONFIG, keep=Keep(1))
    assert steps_in(tmp_path) == [2, 3]
    assert find_last_good(tmp_path) == tmp_path / "step-00000002"
    assert json.loads((tmp_path / "step-00000002" / "train_state.json").read_text()) == {
        "again": True
    }


def test_a_state_that_is_no_json_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    engine, ema = make(single_process())
    with pytest.raises(TypeError):
        save(tmp_path / "checkpoints", 1, engine, ema, {"x": object()}, CONFIG)
    assert not (tmp_path / "checkpoints").exists()
