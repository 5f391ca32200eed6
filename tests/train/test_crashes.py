"""Long proof: SIGKILL at 56 moments, in turn the named ones and random ones, costs nothing."""

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.data.reader import SampleReader
from longtake.train import checkpoint, range_files
from longtake.train.checkpoint import find_last_good, load_full
from longtake.train.ema import Ema
from longtake.train.engine import Engine
from longtake.train.main import run
from longtake.train.run_folder import read_marker
from longtake.train.validation import Validation
from tests.train.forked import import_before_fork
from tests.train.tiny_runs import losses, options, train_here, tree, write_splits

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "7"))  # of each of the 8 moments
STEPS = 60 * ROUNDS


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(owner: Any, name: str, call: int, *, in_child: bool = False) -> None:
    """Have `owner.name` kill its process at its `call`-th call; `in_child` only a child of it."""
    honest, count, parent = getattr(owner, name), iter(range(1, 10**9)), os.getpid()

    def fatal(*args: Any, **options: Any) -> Any:
        if next(count) == call and (os.getpid() != parent) == in_child:
            kill_me()
        return honest(*args, **options)

    setattr(owner, name, fatal)


def kill_after(seconds: float) -> None:
    threading.Thread(target=lambda: (time.sleep(seconds), kill_me()), daemon=True).start()


def kill_worker(chance: random.Random) -> None:
    """A loader's process, and some steps later the run."""
    kill_at(SampleReader, "read", chance.randint(1, 60), in_child=True)
    kill_at(Ema, "update", 9)


MOMENTS: dict[str, Callable[[random.Random], None]] = {
    "after a backward": lambda chance: kill_at(Engine, "clip_and_step", chance.randint(1, 9)),
    "after an optimizer step": lambda chance: kill_at(Ema, "update", chance.randint(1, 9)),
    "while a file is written": lambda chance: kill_at(
        range_files.HashingWriter, "write", chance.randint(1, 120)
    ),
    "between writing and renaming": lambda chance: kill_at(
        checkpoint, "put_in_place", chance.randint(1, 2)
    ),
    "while old ones are deleted": lambda chance: kill_at(checkpoint, "verify", 2),
    "in a loader's process": kill_worker,
    "during validation": lambda chance: kill_at(Validation, "batches", chance.randint(1, 2)),
    "at any time": lambda chance: kill_after(chance.uniform(0.3, 1.5)),
}


def train_killed(words: list[str], moment: str, seed: int) -> int:
    """Train in a forked child that is killed at `moment`; what `os.waitpid` says of it."""
    child = os.fork()
    if child == 0:
        try:
            MOMENTS[moment](random.Random(seed))
            os._exit(run(tree(words)))
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitpid(child, 0)[1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = find_last_good(folder / "checkpoints")
    assert last is not None and last.name == f"step-{STEPS:08d}"
    return load_full(last, "ema") | {f"raw.{k}": v for k, v in load_full(last, "param").items()}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_before_fork()
    write_splits(tmp_path, 40, 8)
    more = (
        *(f"train.steps={STEPS}", "train.checkpoint_every=5", "train.val_every=10"),
        *("train.keep_last=2", "train.max_same_step=0", "tracking=jsonl"),
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_here(options(tmp_path, whole, *more)) == 0

    command = options(tmp_path, killed, *more, "data.num_workers=1")
    kills = dict.fromkeys(MOMENTS, 0)
    for index in range(ROUNDS):
        for number, moment in enumerate(MOMENTS):
            status = train_killed(command, moment, 100 * index + number)
            kills[moment] += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    print("\nkills:", kills)
    assert set(kills.values()) == {ROUNDS}, "a run that was not killed proves nothing"
    assert max(losses(killed)) < STEPS
    assert train_here(command) == 0
    assert read_marker(killed) == "FINISHED"
    for name in ("loss", "data_hash", "val/loss", "val/loss_ema"):
        assert losses(killed, name) == losses(whole, name), name
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(killed).items())
