import errno
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.train import checkpoint, range_files
from longtake.train.checkpoint import (
    CheckpointError,
    Keep,
    find_last_good,
    load_full,
    load_into,
    save,
)
from longtake.train.checkpoint_writer import BackgroundWriter
from longtake.train.ema import Ema, EmaConfig
from longtake.train.engine import Engine, EngineConfig, Ranks, single_process
from tests.train import tiny
from tests.train.forked import import_before_fork, run_ranks

CONFIG = {"model": {"hidden_size": 13}}


@pytest.fixture(scope="module", autouse=True)
def slow_imports() -> None:
    import_before_fork()


def make(ranks: Ranks) -> tuple[Engine, Ema]:
    engine = tiny.build(ranks, "ddp")
    return engine, Ema(engine, EmaConfig(0.9))


def save_steps(folder: Path, steps: range, *, keep_last: int = 0) -> tuple[Engine, Ema]:
    """Trains one ddp rank and saves after each of `steps`."""
    engine, ema = make(single_process())
    for step in steps:
        tiny.train(engine, range(step, step + 1), ema=ema)
        state = {"step": step, "samples_seen": 11 * step}
        save(folder, step, engine, ema, state, CONFIG, keep=Keep(keep_last))
    return engine, ema


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


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


# Damage


def damage_flipped_byte(folder: Path) -> None:
    flip(folder / "rank-00000.safetensors", -100)


def damage_state(folder: Path) -> None:
    flip(folder / "train_state.json", 12)


def damage_truncated_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])


def damage_manifest_value(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"optimizer_steps": 2', '"optimizer_steps": 3'))


def damage_missing_file(folder: Path) -> None:
    (folder / "rank-00000.safetensors").unlink()


def damage_missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_flipped_byte, "rank-00000.safetensors differs from its sha256"),
        (damage_state, "train_state.json differs from its sha256"),
        (damage_truncated_manifest, "manifest.json is damaged"),
        (damage_manifest_value, "manifest.json differs from its own sha256"),
        (damage_missing_file, "rank-00000.safetensors cannot be read"),
        (damage_missing_manifest, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, message: str
) -> None:
    save_steps(tmp_path, range(1, 3))
    damage(tmp_path / "step-00000002")
    with caplog.at_level(logging.WARNING):
        assert find_last_good(tmp_path) == tmp_path / "step-00000001"
    assert "step-00000002 is passed over" in caplog.text
    assert message in caplog.text
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        load_full(tmp_path / "step-00000002")


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert find_last_good(tmp_path / "nowhere") is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000001").mkdir()
    assert find_last_good(tmp_path) is None


def find_with_one_damaged(ranks: Ranks, folder: str) -> list[Any]:
    engine, ema = make(ranks)
    for step in (1, 2):
        save(Path(folder), step, engine, ema, {}, CONFIG)
    if ranks.is_main:
        flip(Path(folder, "step-00000002", "rank-00001.safetensors"), -1)
    ranks.barrier()
    found = find_last_good(Path(folder), ranks)
    assert found is not None
    return [found.name, checkpoint.verify(Path(folder, "step-00000002"), ranks)]


@pytest.mark.dist
def test_ranks_divide_the_hashing_and_agree(tmp_path: Path) -> None:
    problem = "rank-00001.safetensors differs from its sha256 in manifest.json"
    assert run_ranks(2, find_with_one_damaged, str(tmp_path)) == [["step-00000001", [problem]]] * 2


# Full disks and killed writers


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(small_disk: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint of step \d was not written: .*no space"):
        save_steps(small_disk, range(1, 9))
    whole = [path for path in small_disk.iterdir() if not path.name.startswith("step-")]
    assert whole == []
    assert find_last_good(small_disk) is not None


def save_with_one_full_disk(ranks: Ranks, folder: str) -> list[Any]:
    engine, ema = make(ranks)
    save(Path(folder), 1, engine, ema, {}, CONFIG)
    write = range_files.HashingWriter.write

    def full(writer: range_files.HashingWriter, data: bytes | memoryview) -> None:
        if writer.size > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, data)

    if ranks.rank == 1:
        range_files.HashingWriter.write = full  # type: ignore[method-assign]
    try:
        save(Path(folder), 2, engine, ema, {}, CONFIG)
    except CheckpointError as error:
        return [str(error), sorted(p.name for p in Path(folder).iterdir())]
    return ["no error", []]


@pytest.mark.dist
def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, save_with_one_full_disk, str(tmp_path))
    assert first == second
    assert first[0].startswith("the checkpoint of step 2 was not written: rank 1: no space left")
    assert "train.keep_last" in first[0]
    assert first[1] == ["step-00000001"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_folder_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save_steps(tmp_path, range(1, 2))


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="FileExistsError"):
        save_steps(tmp_path / "checkpoints", range(1, 2))


def kill_self(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_killed(folder: Path, step: int, where: str) -> int:
    """Saves in a forked child that is killed at `where`; returns the signal."""
    child = os.fork()
    if child == 0:
        engine, ema = make(single_process())
        if where == "in the rank file":
            range_files.HashingWriter.stamp = kill_self  # type: ignore[method-assign]
        elif where == "before the manifest":
            checkpoint.seal = kill_self  # type: ignore[assignment]
        elif where == "before the rename":
            checkpoint.put_in_place = kill_self  # type: ignore[assignment]
        else:
            rename, calls = Path.rename, []

            def second_is_fatal(path: Path, target: Path) -> Path:
                calls.append(path)
                if len(calls) == 3:  # manifest, old folder away, then the new one in its place
                    kill_self()
                return rename(path, target)

            Path.rename = second_is_fatal  # type: ignore[method-assign]
        save(folder, step, engine, ema, {}, CONFIG)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status)


@pytest.mark.parametrize(
    "where", ["in the rank file", "before the manifest", "before the rename", "between renames"]
)
def test_a_killed_writer_leaves_the_last_good_one(tmp_path: Path, where: str) -> None:
    engine, ema = save_steps(tmp_path, range(1, 3))
    expected = load_full(tmp_path / "step-00000002")
    step = 2 if where == "between renames" else 3
    assert save_killed(tmp_path, step, where) == signal.SIGKILL
    assert (tmp_path / ".unfinished-step-00000003").exists() == (step == 3)
    found = find_last_good(tmp_path)
    assert found is not None
    for name, tensor in load_full(found).items():
        assert torch.equal(tensor, expected[name]), name
    save(tmp_path, 4, engine, ema, {}, CONFIG)
    save(tmp_path, 2, engine, ema, {}, CONFIG)
    assert {p.name for p in tmp_path.iterdir()} == {f"step-0000000{i}" for i in (1, 2, 4)}


# Keeping and deleting


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


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


# Written in the background


def slow_write(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds the writer back in every file until the event is set."""
    go, write = threading.Event(), range_files.HashingWriter.write

    def held(writer: range_files.HashingWriter, data: bytes | memoryview) -> None:
        assert go.wait(60)
        write(writer, data)

    monkeypatch.setattr(range_files.HashingWriter, "write", held)
    return go


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ema = make(single_process())
    writer = BackgroundWriter(tmp_path, single_process(), Keep(last=2, every=4))
    for step in range(1, 9):
        tiny.train(engine, range(step, step + 1), ema=ema)
        expected = tiny.full_state(engine, ema)
        go = slow_write(monkeypatch)
        writer.start(step, engine, ema, None, {"step": step}, CONFIG)
        tiny.train(engine, range(99, 100), ema=ema)  # none of it may get into the files
        go.set()
        writer.finish()
        monkeypatch.undo()
        load_into(tmp_path / f"step-{step:08d}", engine, ema)
        assert tiny.full_state(engine, ema) == expected
    assert steps_in(tmp_path) == [4, 7, 8]
    writer.close()


def write_with_one_full_disk(ranks: Ranks, folder: str) -> list[Any]:
    """Two checkpoints; the disk of rank 1 is full at the second. What each rank learns of it."""
    engine, ema = make(ranks)
    writer = BackgroundWriter(Path(folder), ranks, Keep(0, 0))
    writer.start(1, engine, ema, None, {}, CONFIG)
    writer.finish()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if ranks.rank == 1:
        range_files.HashingWriter.write = full  # type: ignore[method-assign]
    writer.start(2, engine, ema, None, {}, CONFIG)
    history = tiny.train(engine, range(4), ema=ema)  # collectives of training between the others
    with pytest.raises(CheckpointError, match="rank 1: no space left"):
        writer.finish()
    assert writer.problem() == ""  # said once
    found = find_last_good(Path(folder), ranks)
    assert found is not None
    return [found.name, len(history)]


@pytest.mark.dist
def test_a_failure_of_the_background_is_one_on_all_ranks(tmp_path: Path) -> None:
    outcome = run_ranks(2, write_with_one_full_disk, str(tmp_path))
    assert outcome == [["step-00000001", 4]] * 2
