"""The pool of `longtake pack` outlives what its tasks do to it."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from longtake.data.pack.workers import WorkerPool


def _work(task: str, alive: Callable[[], None]) -> Any:
    if task == "hang":
        time.sleep(1000)
    if task == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "leave":
        os._exit(3)
    if task == "greedy":
        return len(bytearray(2**40))
    if task == "defect":
        raise KeyError("oops")
    if task == "disk full":
        raise OSError(28, "No space left on device", "spool")
    return task.upper()


def _run(tasks: list[str], num_workers: int, timeout: float = 60) -> dict[str, Any]:
    found: dict[str, Any] = {}
    queue = list(enumerate(tasks))
    with WorkerPool(_work, num_workers, timeout, 2**32) as pool:
        while queue or pool.num_busy:
            while queue and pool.has_idle:
                pool.submit(*queue.pop(0))
            for index, result, reason in pool.results():
                found[tasks[index]] = result or reason
    return found


@pytest.mark.parametrize("num_workers", [1, 3])
def test_what_kills_a_worker_costs_its_task(num_workers: int) -> None:
    tasks = ["a", "crash", "b", "leave", "greedy", "c", "defect", "d"]
    found = _run(tasks, num_workers)
    assert [found[task] for task in "abcd"] == ["A", "B", "C", "D"]
    assert "signal 9" in found["crash"] and "exit 3" in found["leave"]
    assert "memory" in found["greedy"] and "KeyError: 'oops'" in found["defect"]


def test_what_hangs_is_killed() -> None:
    found = _run(["hang", "a"], 1, timeout=0.3)
    assert found == {"hang": "no progress within 0.3 s", "a": "A"}


def test_signs_of_life_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtake.data.pack.workers._HEARTBEAT", 0.0)

    def slow(task: str, alive: Callable[[], None]) -> str:
        for _ in range(40):
            time.sleep(0.05)
            alive()
        return task

    with WorkerPool(slow, 1, 1.0, 2**32) as pool:
        pool.submit(0, "long")
        while not (found := pool.results()):
            continue
    assert found == [(0, "long", None)]


def test_a_full_disk_stops_everything() -> None:
    with pytest.raises(OSError, match="No space left on device: 'spool'"):
        _run(["a", "disk full", "b"], 2)


def test_workers_die_with_their_parent() -> None:
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        pool = WorkerPool(_work, 1, 60, 2**32)
        pool.submit(0, "hang")
        [(process, *_)] = pool._busy.values()
        os.write(write, str(process.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    worker = int(os.read(read, 32))
    deadline = time.monotonic() + 30
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
