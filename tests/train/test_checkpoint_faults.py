"""Damaged checkpoints, full disks and killed writers: the last good one counts."""

import errno
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.train import checkpoint, range_files
from longtake.train.checkpoint import (
    CheckpointError,
    find_last_good,
    load_full,
    save,
)
from longtake.train.engine import Ranks, single_process
from tests.train.forked import import_before_fork, run_ranks
from tests.train.tiny_checkpoints import CONFIG, damage_flipped_byte, flip, make, save_steps


@pytest.fixture(scope="module", autouse=True)
def slow_imports() -> None:
    import_before_fork()


# Damage


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
