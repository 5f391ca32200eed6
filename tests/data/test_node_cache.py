import errno
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longtake.data.config import CacheConfig
from longtake.data.shards.node_cache import NodeCache, cache_folder


def name_of(number: int) -> str:
    return f"{number % 7:02x}{number:030x}"


def data_of(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def never() -> bytes:
    raise AssertionError("fetched although it is kept")


def fetch(cache: NodeCache, number: int, size: int = 1000) -> bytes:
    return cache.fetch(name_of(number), size, lambda: data_of(number, size), 5.0)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_what_was_fetched_is_kept(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10_000)
    assert fetch(cache, 1) == data_of(1)
    assert cache.fetch(name_of(1), 1000, never, 5.0) == data_of(1)
    assert NodeCache(tmp_path, 10_000).get(name_of(1), 1000) == data_of(1)
    assert cache.drop(name_of(1)) and not cache.drop(name_of(1))
    assert cache.get(name_of(1), 1000) is None and not files(tmp_path)


def test_the_least_recently_read_goes_first(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10_500)
    for number in range(10):
        fetch(cache, number)
        # Clocks of file systems tick coarsely.
        os.utime(tmp_path / name_of(number)[:2] / name_of(number), (number, number))
    for number in (0, 3):
        assert cache.get(name_of(number), 1000)
    fetch(cache, 10)
    assert {number for number in range(11) if cache.has(name_of(number))} == {0, 3, *range(4, 11)}
    assert num_bytes(tmp_path) <= 10_500


def test_a_reader_goes_on_while_its_file_is_removed(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 2_500)
    fetch(cache, 0)
    with open(tmp_path / name_of(0)[:2] / name_of(0), "rb") as file:
        for number in range(1, 6):
            fetch(cache, number)
        assert not cache.has(name_of(0)) and file.read() == data_of(0)


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1_500)

    def fail() -> bytes:
        raise ConnectionError("gone")

    for _ in range(3):
        with pytest.raises(ConnectionError):
            cache.fetch(name_of(1), 1000, fail, 5.0)
    assert not files(tmp_path)
    assert fetch(cache, 1) == data_of(1)


def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10_000)
    entered, go = threading.Event(), threading.Event()

    def load() -> bytes:
        entered.set()
        assert go.wait(10)
        return data_of(1)

    first = threading.Thread(target=cache.fetch, args=(name_of(1), 1000, load, 5.0))
    first.start()
    assert entered.wait(10)
    with pytest.raises(BlockingIOError):
        cache.claim(name_of(1), 1000)
    # Nobody waits for ever: after its patience a reader fetches for itself, without keeping.
    assert cache.fetch(name_of(1), 1000, lambda: data_of(1), 0.05) == data_of(1)
    second = threading.Thread(target=cache.fetch, args=(name_of(1), 1000, never, 10.0))
    second.start()
    go.set()
    for thread in (first, second):
        thread.join(10)
    assert not first.is_alive() and not second.is_alive()
    assert cache.get(name_of(1), 1000) == data_of(1)


def _hold(folder: Path, number: int, ready: Callable[[], None]) -> None:
    cache = NodeCache(folder, 10_000)

    def load() -> bytes:
        ready()
        time.sleep(60)
        return b""

    cache.fetch(name_of(number), 1000, load, 5.0)


def _killed_fetch(folder: Path, number: int) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(folder, number, ready.set))
    process.start()
    assert ready.wait(20)
    process.kill()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL


def test_kill_9_while_fetching(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10_000)
    fetch(cache, 0)
    for number in (1, 2):
        _killed_fetch(tmp_path, number)
    assert [path.suffix for path in files(tmp_path)].count(".tmp") == 2
    assert fetch(cache, 1) == data_of(1)  # its claim died with its owner
    cache.close()
    # The first process of the next run counts anew and cleans up.
    cache = NodeCache(tmp_path, 10_000)
    assert [path.suffix for path in files(tmp_path)] == ["", ""]
    for number in range(2, 10):
        fetch(cache, number)
    assert all(cache.has(name_of(number)) for number in range(10))
    assert num_bytes(tmp_path) == 10_000


def test_a_smaller_limit_and_a_lost_count_hold_at_once(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10_000)
    for number in range(10):
        fetch(cache, number)
    cache.close()
    (tmp_path / ".lock").write_bytes(b"")
    NodeCache(tmp_path, 4_000)
    assert num_bytes(tmp_path) <= 4_000


def _work(folder: Path, seed: int) -> None:
    cache = NodeCache(folder, 20_000)
    for number in np.random.default_rng(seed).integers(0, 60, 150).tolist():
        assert fetch(cache, number) == data_of(number)
        with cache._locked():  # nothing comes or goes meanwhile
            assert num_bytes(folder) <= 20_000


def test_many_processes_keep_the_limit_and_read_right(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(tmp_path, seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    killed = context.Process(target=_work, args=(tmp_path, 9))
    killed.start()
    time.sleep(0.1)
    killed.kill()
    for worker in [*workers, killed]:
        worker.join(40)
    assert [worker.exitcode for worker in workers] == [0] * 4


def test_a_full_disk_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = NodeCache(tmp_path, 10_000)
    fetch(cache, 0)

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.warns(RuntimeWarning, match="No space left.*without the cache"):
            assert fetch(cache, 1) == data_of(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(5):
            assert fetch(cache, number) == data_of(number)
    assert len(files(tmp_path)) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="without the cache"):
        cache = NodeCache(tmp_path / "file" / "samples", 10_000)
    assert fetch(cache, 1) == data_of(1)
    assert not cache.drop(name_of(1))
    cache.close()


def test_a_sample_beyond_the_limit_is_said_once(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1_000)
    with pytest.warns(RuntimeWarning, match=r"max_bytes=1000 is less than one sample of 2000"):
        assert fetch(cache, 1, 2000) == data_of(1, 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fetch(cache, 2, 2000) == data_of(2, 2000)
        assert fetch(cache, 3, 1000) == data_of(3, 1000)
    assert len(files(tmp_path)) == 1


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "mine"))
    assert cache_folder(CacheConfig()) == tmp_path / "mine"
    monkeypatch.delenv("LONGTAKE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(CacheConfig()) == tmp_path / "longtake"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(CacheConfig()) == Path.home() / ".cache/longtake"
    assert cache_folder(CacheConfig("~/x")) == Path.home() / "x"
