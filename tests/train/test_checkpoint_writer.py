"""Checkpoints that are written while training goes on."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from longtake.train import range_files
from longtake.train.checkpoint import (
    CheckpointError,
    Keep,
    find_last_good,
    load_into,
)
from longtake.train.checkpoint_writer import BackgroundWriter
from longtake.train.engine import Ranks, single_process
from tests.train import tiny
from tests.train.forked import import_before_fork, run_ranks
from tests.train.tiny_checkpoints import CONFIG, make, steps_in


@pytest.fixture(scope="module", autouse=True)
def slow_imports() -> None:
    import_before_fork()


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
