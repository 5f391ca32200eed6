"""A run comes back by itself when a rank dies; one that dies at the same step for ever does not."""

import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.launch.torchrun import Launch, torchrun_argv, torchrun_environment
from longtake.train.checkpoint import load_full
from longtake.train.main import run
from longtake.train.ranks import shutdown
from longtake.train.run_folder import PREEMPTED, mark, read_marker
from longtake.train.trainer import Training
from tests.train.forked import free_port, import_before_fork, run_ranks
from tests.train.tiny_runs import (
    kill_group,
    kill_or_leave,
    losses,
    options,
    start_command,
    train_here,
    train_on_rank,
    tree,
    wait_for,
    write_splits,
)

NUM_KILLS, NUM_FINISHED = 10, 50


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("shards"), 24, 4)


def test_a_run_that_always_fails_at_one_step_stays_ended(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = options(shards, tmp_path, "train.checkpoint_every=3")
    load = Training.load

    def fail(self: Training) -> list:
        if self.step == broken:
            raise RuntimeError("planted")
        return load(self)

    monkeypatch.setattr(Training, "load", fail)
    for step in (5, 7, 7, 7):
        broken = step
        assert train_here(command) == 1
        assert "planted" in (tmp_path / "FAILED").read_text()
    broken = -1
    assert train_here(command) == 1
    assert "the last 3 attempts all ended at step 7" in (tmp_path / "FAILED").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["attempts"] == 4
    assert train_here([*command, "resume=force"]) == 0
    assert read_marker(tmp_path) == "FINISHED"


def test_torchrun_does_not_bring_a_preempted_run_back(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It restarts whoever leaves with another code than 0; a signal was meant to end them."""
    mark(tmp_path, PREEMPTED, step=3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("LONGTAKE_LAUNCHED", str(time.time() - 60))
    assert train_here(options(shards, tmp_path)) == 75
    monkeypatch.setenv("LONGTAKE_LAUNCHED", str(time.time() + 60))  # an older launch's marker
    assert train_here(options(shards, tmp_path, "train.steps=2")) == 0


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_rank(pid: int, rank: int) -> bool:
    try:
        return f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()
    except OSError:  # it has just ended
        return False


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_rank_killed_ten_times_comes_back_ten_times(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in torchrun_environment().items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    more = "train.steps=1000000", "train.checkpoint_every=5", "data.num_workers=0"
    words = options(shards, folder, *more, "train.max_same_step=0")
    argv = torchrun_argv(Launch(2, max_restarts=NUM_KILLS), words)
    assert argv[:2] == [sys.executable, "-m"]
    process = start_command([], *argv[2:], cwd=tmp_path)
    try:
        wait_for(lambda: max(losses(folder), default=0) >= 7, process, 300)
        recovery, lost = [], []
        for kill in range(NUM_KILLS):
            victim = next(pid for pid in children_of(process.pid) if is_rank(pid, kill % 2))
            killed_at, reached = time.monotonic(), max(losses(folder))
            os.kill(victim, signal.SIGKILL)
            attempt = kill + 2
            wait_for(lambda n=attempt: rows_of(folder, n) >= 1, process, 300)
            recovery.append(time.monotonic() - killed_at)
            lost.append(reached + 1 - first_step_of(folder, attempt))
            wait_for(lambda n=attempt: rows_of(folder, n) >= 7, process, 300)
        print(
            f"\n{NUM_KILLS} kills: recovery {statistics.median(recovery):.1f} s (max "
            f"{max(recovery):.1f}), lost steps {statistics.median(lost):.0f} (max {max(lost)})"
        )
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        kill_or_leave(process)
    assert read_marker(folder) == "PREEMPTED"
    assert min(lost) >= 0 and max(lost) <= 12


def attempt_rows(folder: Path, attempt: int) -> list[dict[str, Any]]:
    *lines, _ = (folder / "metrics.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines if line]
    return [row for row in rows if row["attempt"] == attempt]


def rows_of(folder: Path, attempt: int) -> int:
    return len(attempt_rows(folder, attempt))


def first_step_of(folder: Path, attempt: int) -> int:
    return attempt_rows(folder, attempt)[0]["step"]


def finish(ranks: Any, overrides: list[str]) -> None:
    shutdown(run(tree(overrides)))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_finished_run_exits_0_fifty_times(shards: Path, tmp_path: Path) -> None:
    import_before_fork()
    command = options(shards, tmp_path, "train.steps=2")
    assert train_here(command) == 0
    for _ in range(NUM_FINISHED):
        with pytest.raises(FileNotFoundError):  # all exit codes are 0; the ranks report nothing
            run_ranks(2, finish, command)


def start_node(rank: int, port: int, words: list[str], cwd: Path) -> Any:
    """`longtake train` of one of two nodes; both are this machine."""
    where = "--nnodes=2", f"--node-rank={rank}", f"--rendezvous=127.0.0.1:{port}"
    return start_command(
        words,
        *("longtake.launch.cli", "train", *where, "--interface=lo", "--max-restarts=4"),
        cwd=cwd,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lost", [1, 0], ids=["another", "the first"])
def test_a_lost_node_comes_back(shards: Path, tmp_path: Path, lost: int) -> None:
    """The first node holds the rendezvous: the other one must find a new one there."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    more = "train.steps=60", "train.checkpoint_every=5", "data.num_workers=0", "tracking=jsonl"
    port = free_port()
    words = options(shards, folder, *more)
    nodes = [start_node(rank, port, words, tmp_path) for rank in range(2)]
    try:
        wait_for(lambda: max(losses(folder), default=0) >= 12, nodes[0], 300)
        killed_at, reached = time.monotonic(), max(losses(folder))
        kill_group(nodes[lost])  # launcher and torchrun: the worker dies with its parent
        nodes[lost].wait()
        nodes[lost] = start_node(lost, port, words, tmp_path)
        wait_for(lambda: rows_of(folder, 2) >= 1, nodes[1 - lost], 300)
        print(
            f"\nrecovery {time.monotonic() - killed_at:.1f} s, lost steps "
            f"{reached + 1 - first_step_of(folder, 2)}"
        )
        assert [node.wait(300) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            kill_or_leave(node)
    assert run_ranks(2, train_on_rank, options(shards, whole, *more)) == [0, 0]
    for kind in ("param", "ema"):
        mine, expected = (load_full(last_of(run), kind) for run in (folder, whole))
        assert all(torch.equal(mine[name], expected[name]) for name in expected)


def last_of(folder: Path) -> Path:
    return folder / "checkpoints" / "step-00000060"
