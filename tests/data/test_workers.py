import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import active_children, get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.data.workers import Ahead, Workers


def square(item: int) -> Tensor:
    return torch.full((1000,), item**2)


def numbers(results: Iterator[Tensor], count: int) -> list[int]:
    return [int(result[-1]) for result in itertools.islice(results, count)]


def start(
    work: Callable[[int], Tensor], num_workers: int = 2, ahead: int = 3
) -> Workers[int, Tensor]:
    return Workers(work, itertools.count(), num_workers=num_workers, ahead=ahead)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_results_come_in_order(num_workers: int) -> None:
    workers = start(square, num_workers)
    assert numbers(iter(workers), 20) == [n**2 for n in range(20)]
    workers.close()
    assert not active_children()


def test_an_end_of_the_items_is_the_end() -> None:
    for count in (0, 1, 2, 7):
        workers = Workers(square, iter(range(count)), num_workers=3, ahead=2)
        assert numbers(iter(workers), 99) == [n**2 for n in range(count)]
        workers.close()


def test_what_work_raises_is_raised_in_its_turn() -> None:
    def work(item: int) -> Tensor:
        if item == 4:
            raise FileNotFoundError(f"no {item}")
        return square(item)

    workers = start(work)
    results = iter(workers)
    assert numbers(results, 4) == [0, 1, 4, 9]
    with pytest.raises(FileNotFoundError, match=r"worker at 4[\s\S]*no 4"):
        next(results)
    workers.close()


def test_a_dropped_pool_leaves_no_process() -> None:
    workers = start(square)
    results = iter(workers)
    next(results)
    assert len(active_children()) == 2
    del workers, results
    gc.collect()
    assert not active_children()


def test_a_killed_worker_is_replaced_and_nothing_is_lost() -> None:
    workers = start(square, 3)
    results, found = iter(workers), []
    with pytest.warns(RuntimeWarning, match=r"worker died \(SIGKILL\) at \d+ or soon after"):
        for turn in range(30):
            found += numbers(results, 1)
            if turn % 4 == 0:
                process = workers._workers[turn % 3].process
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
    workers.close()
    assert found == [n**2 for n in range(30)]


def test_killed_in_the_middle_of_a_long_result(tmp_path: Path) -> None:
    """More than a pipe holds: the worker is killed half through, and the other end must notice."""
    first = tmp_path / "first"

    def work(item: int) -> bytes:
        if item == 1 and not first.exists():
            first.touch()
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes([item]) * 2**22

    workers = Workers(work, itertools.count(), num_workers=1, ahead=2)
    results = iter(workers)
    assert next(results) == bytes(2**22)
    while not first.exists():
        time.sleep(0.01)
    time.sleep(0.5)
    with pytest.warns(RuntimeWarning, match="SIGKILL"):
        found = [next(results), next(results)]
    assert found == [bytes([n]) * 2**22 for n in (1, 2)]
    workers.close()


def test_an_item_that_always_kills_is_named() -> None:
    def work(item: int) -> Tensor:
        if item == 5:
            os._exit(3)
        return square(item)

    workers = start(work)
    results = iter(workers)
    with pytest.warns(RuntimeWarning):
        assert numbers(results, 5) == [0, 1, 4, 9, 16]
        with pytest.raises(ChildProcessError, match="died 3 times in a row at 5, last by exit c"):
            next(results)
    workers.close()
    assert not active_children()


def test_two_pools_do_not_hold_each_other() -> None:
    first, second = start(square), start(square)
    assert numbers(iter(first), 3) == numbers(iter(second), 3) == [0, 1, 4]
    began = time.monotonic()
    first.close()
    assert numbers(iter(start(square)), 3) == [0, 1, 4] and time.monotonic() - began < 4
    second.close()


def test_workers_may_have_children_of_their_own() -> None:
    def work(item: int) -> Tensor:
        child = get_context("fork").Process(target=square, args=(item,), daemon=True)
        child.start()
        child.join()
        return torch.full((1,), int(child.exitcode or 0))

    workers = start(work)
    assert numbers(iter(workers), 3) == [0, 0, 0]
    workers.close()


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)", "raise SystemExit(3)"])
def test_workers_end_with_their_parent(end: str) -> None:
    code = (
        "import itertools, os\nfrom longtake.data.workers import Workers\n"
        "workers = Workers(str, itertools.count(), num_workers=2, ahead=2)\n"
        "results = iter(workers); next(results)\n"
        "print(*(w.process.pid for w in workers._workers), flush=True)\n" + end
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    deadline = time.monotonic() + 20
    for pid in map(int, run.stdout.split()):
        while _lives(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert len(run.stdout.split()) == 2 and not run.stderr


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_thread_runs_ahead_and_passes_errors_on() -> None:
    begun = []

    def results() -> Iterator[int]:
        for number in range(10):
            begun.append(number)
            if number == 6:
                raise OSError("six")
            yield number

    found = iter(Ahead(results(), 2))
    assert [next(found) for _ in range(6)] == list(range(6))
    with pytest.raises(OSError, match="six"):
        next(found)
    assert list(Ahead(iter("abc"), 2)) == ["a", "b", "c"]
    endless = Ahead(itertools.count(), 2)
    assert next(iter(endless)) == 0
    endless.close()
    assert threading.active_count() == 1 or all(
        thread.name != "data loader ahead" for thread in threading.enumerate()
    )


def test_no_warning_without_a_death() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workers = start(square)
        numbers(iter(workers), 10)
        workers.close()
