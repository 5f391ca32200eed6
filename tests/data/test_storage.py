import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from longtake.data.config import CacheConfig
from longtake.data.shards import ShardError, Span, remote, remote_shards
from longtake.data.shards.storage import (
    Shards,
    StorageError,
    fetch_catalogue,
    is_remote,
    join,
    list_tars,
    local_copy,
    parse_root,
    read_file,
)
from tests.data.http_store import HttpStore, serve

SIZE = 300_000


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStore]:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote_shards, "PAUSE", 0.01)
    folder = tmp_path / "store"
    folder.mkdir()
    for number in range(3):
        (folder / f"shard-{number}.tar").write_bytes(content(number))
    with serve(folder) as store:
        yield store


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def cache_config(tmp_path: Path, **options: object) -> CacheConfig:
    settings = {"max_bytes": 2**26, "retries": 3, "timeout": 5.0, **options}
    return CacheConfig(str(tmp_path / "cache"), **settings)  # type: ignore[arg-type]


def spans(number: int) -> list[Span]:
    """Payload and captions of the sample that lies at this place of a shard."""
    return [Span(number * 5000 + 512, 4000), Span(number * 5000 + 4608, 100)]


def expected(shard: int, number: int) -> list[bytes]:
    data = content(shard)
    return [data[span.offset : span.offset + span.size] for span in spans(number)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kept(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache/samples").glob("??/*") if path.suffix != ".tmp"]


@pytest.mark.parametrize(
    "text",
    [
        "pipe:cat /etc/passwd",
        "PIPE:ls",
        "http://h/x::pipe:ls",
        "simplecache::s3://b/x",
        "zip://a.zip::http://h/y",
        "reference://x",
        "cached://x",
        "ssh://host/x",
        "gopen:x",
        "file://host/x",
        "http:",
        "http:///x",
        "s3:bucket",
    ],
)
def test_schemes_that_execute_or_unpack_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="are opened"):
        parse_root(text)


def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_root(tmp_path) == tmp_path and parse_root("a/b:c") == Path("a/b:c")
    assert parse_root("file:///data/my%20clips") == Path("/data/my clips")
    url = parse_root("http://h/x/")
    assert url == "http://h/x" and is_remote(url) and not is_remote(tmp_path)
    assert join(url, "a.tar") == "http://h/x/a.tar" and join(tmp_path, "a") == tmp_path / "a"
    with pytest.raises(ValueError, match="query") as error:
        parse_root("https://me:secret@h/x?token=abc")
    assert "secret" not in str(error.value) and "abc" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://: .*s3fs"):
        parse_root("s3://bucket/x")


def test_files_and_listings(store: HttpStore, tmp_path: Path) -> None:
    (store.folder / "manifest.json").write_text("{}")
    for root in (store.url, store.folder):
        assert read_file(root, "manifest.json") == b"{}"
        assert list_tars(root) == [(f"shard-{n}.tar", SIZE) for n in range(3)]
        with local_copy(root, "shard-1.tar") as path:
            assert path.read_bytes() == content(1)
        assert path.exists() is (root == store.folder)
        with pytest.raises(FileNotFoundError):
            read_file(root, "absent.json")
    with pytest.raises(ValueError, match="no such folder"):
        list_tars(f"{store.url}/absent")
    odd = store.folder / "odd"
    odd.mkdir()
    with pytest.raises(ValueError, match=r"lists no \*\.tar"):
        list_tars(f"{store.url}/odd")
    (odd / "a b#100%25.tar").write_bytes(b"x")
    assert list_tars(f"{store.url}/odd") == [("a b#100%25.tar", 1)]
    assert Shards(f"{store.url}/odd", cache_config(tmp_path)).read(
        "a b#100%25.tar", [Span(0, 1)]
    ) == [b"x"]


def test_a_local_shard_is_read_by_offset(store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.folder, cache_config(tmp_path))
    assert shards.read("shard-1.tar", spans(3)) == expected(1, 3)
    again = pickle.loads(pickle.dumps(shards))
    assert again.read("shard-1.tar", spans(4)) == expected(1, 4)
    with pytest.raises(ShardError, match="ends 10 bytes short"):
        shards.read("shard-1.tar", [Span(SIZE - 10, 20)])
    assert not shards.forget("shard-1.tar", spans(3)) and not (tmp_path / "cache").exists()
    shards.close()
    assert shards.read("shard-0.tar", spans(0)) == expected(0, 0)


def test_remote_members_come_as_one_range_and_once(store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.url, cache_config(tmp_path))
    for _ in range(2):
        for number in range(10):
            read = shards.read("shard-0.tar", spans(number), shard_bytes=SIZE)
            assert read == expected(0, number)
    assert len(store.ranges) == 10 and store.sent["shard-0.tar"] == 10 * 4196
    assert store.requests["HEAD shard-0.tar"] == 1
    # What is on the node needs no server, in another process neither.
    store.fault = lambda method, name: 500
    other = pickle.loads(pickle.dumps(shards))
    assert other.read("shard-0.tar", spans(4), shard_bytes=SIZE) == expected(0, 4)
    # Members far apart are ranges of their own, whatever their order.
    store.fault = lambda method, name: None
    far = [Span(200_000, 50), Span(1000, 50)]
    found = shards.read("shard-2.tar", far, shard_bytes=SIZE)
    assert found == [content(2)[200_000:200_050], content(2)[1000:1050]]
    assert store.sent["shard-2.tar"] == 100


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "short"])
def test_passing_faults_are_tried_again(fault: str | int, store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.url, cache_config(tmp_path))
    store.fail(fault, fault, fault)
    assert shards.read("shard-0.tar", spans(1), shard_bytes=SIZE) == expected(0, 1)
    store.fail(fault, fault, method="HEAD")
    assert shards.read("shard-1.tar", spans(1), shard_bytes=SIZE) == expected(1, 1)


def test_a_slow_answer_is_given_up_and_asked_again(store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.url, cache_config(tmp_path, timeout=0.2))
    store.fail("slow")
    assert shards.read("shard-0.tar", spans(1)) == expected(0, 1)
    store.fault = lambda method, name: "slow"
    shards = Shards(store.url, cache_config(tmp_path, timeout=0.1, retries=1))
    with pytest.raises(StorageError, match=r"shard-0\.tar: no answer in time, after 2 tries"):
        shards.read("shard-0.tar", spans(2))


@pytest.mark.parametrize(
    ("fault", "tries", "message"),
    [
        (500, 4, r"shard-0\.tar: the server answers 500 .*after 4 tries"),
        ("drop", 4, "after 4 tries"),
        (404, 1, "the store has no such file"),
        (403, 1, "the server answers 403"),
    ],
)
def test_an_error_that_stays_stops_the_run(
    fault: str | int, tries: int, message: str, store: HttpStore, tmp_path: Path
) -> None:
    store.fault = lambda method, name: fault if method == "GET" else None
    with pytest.raises(StorageError, match=message) as error:
        Shards(store.url, cache_config(tmp_path)).read("shard-0.tar", spans(0), shard_bytes=SIZE)
    assert f"{store.url}/shard-0.tar" in str(error.value)
    # aiohttp itself asks once more where a kept connection is closed.
    assert tries <= store.requests["GET shard-0.tar"] <= (2 * tries if fault == "drop" else tries)
    assert not isinstance(error.value, ValueError)  # not the sample's fault


def test_no_server_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    with serve(tmp_path) as store:
        url = store.url
    with pytest.raises(StorageError, match="after 4 tries; is the store reachable"):
        Shards(url, cache_config(tmp_path)).read("a.tar", [Span(0, 1)], shard_bytes=1)


def test_a_server_that_ignores_ranges(store: HttpStore, tmp_path: Path) -> None:
    store.fault = lambda method, name: "whole" if method == "GET" else None
    shards = Shards(store.url, cache_config(tmp_path))
    shards.prefetch([("shard-0.tar", spans(number)) for number in range(20)])
    with pytest.raises(StorageError, match="ignores byte ranges"):
        shards.read("shard-0.tar", spans(0), shard_bytes=SIZE)
    with pytest.raises(StorageError, match="ignores byte ranges"):
        shards.read("shard-0.tar", [Span(0, 100)], shard_bytes=SIZE)


def test_a_shard_of_another_size_is_refused_by_name(store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.url, cache_config(tmp_path))
    with pytest.raises(StorageError, match=r"shard-0\.tar: has 300000 bytes, the catalogue says 9"):
        shards.read("shard-0.tar", spans(0), shard_bytes=9)


def test_prefetched_samples_are_not_fetched_again(store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.url, cache_config(tmp_path))
    wanted = [(f"shard-{n % 3}.tar", spans(n // 3)) for n in range(90)]
    shards.prefetch(wanted)
    wait_until(lambda: len(kept(tmp_path)) == 90)
    store.fault = lambda method, name: 500
    for number in range(90):
        read = shards.read(*wanted[number], shard_bytes=SIZE)
        assert read == expected(number % 3, number // 3)
    assert len(store.ranges) == 90


def test_faults_in_the_background_are_left_to_the_read(store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.url, cache_config(tmp_path, retries=12))
    shards.read("shard-0.tar", spans(0))
    store.fail(*[500, "drop", "short"] * 4)
    shards.prefetch([("absent.tar", spans(0))])
    shards.prefetch([("shard-1.tar", spans(n)) for n in range(40)])
    for number in range(40):
        assert shards.read("shard-1.tar", spans(number), shard_bytes=SIZE) == expected(1, number)
    assert len({r for r in store.ranges if r[0] == "shard-1.tar"}) == 40


def test_prefetch_keeps_within_its_share_of_the_cache(store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.url, cache_config(tmp_path, max_bytes=2**20))
    shards.prefetch([("shard-0.tar", spans(number)) for number in range(50)])
    share = 2**20 // 16 // 4196
    wait_until(lambda: len(kept(tmp_path)) == share)
    shards.prefetch([("shard-1.tar", spans(0))])  # what is behind it in the queue is done then
    wait_until(lambda: len(kept(tmp_path)) == share + 1)


def test_a_damaged_copy_is_fetched_again(store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.url, cache_config(tmp_path))
    shards.read("shard-0.tar", spans(0), shard_bytes=SIZE)
    (path,) = kept(tmp_path)
    path.write_bytes(bytes(path.stat().st_size))
    assert shards.read("shard-0.tar", spans(0), shard_bytes=SIZE) != expected(0, 0)
    assert shards.forget("shard-0.tar", spans(0)) and not shards.forget("shard-0.tar", spans(0))
    assert shards.read("shard-0.tar", spans(0), shard_bytes=SIZE) == expected(0, 0)
    (path,) = kept(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])  # a power cut shows in the length
    assert shards.read("shard-0.tar", spans(0), shard_bytes=SIZE) == expected(0, 0)


def _read_all(url: str, cache: CacheConfig, order: int) -> None:
    shards = Shards(url, cache)
    numbers = np.random.default_rng(order // 2).permutation(60).tolist()  # pairs read alike
    shards.prefetch([("shard-0.tar", spans(number)) for number in numbers])
    for number in numbers:
        assert shards.read("shard-0.tar", spans(number), shard_bytes=SIZE) == expected(0, number)


def test_processes_of_a_node_fetch_each_sample_once(store: HttpStore, tmp_path: Path) -> None:
    cache = cache_config(tmp_path)
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=_read_all, args=(store.url, cache, n)) for n in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
        assert reader.exitcode == 0
    assert len(store.ranges) == len(set(store.ranges)) == 60
    assert store.sent["shard-0.tar"] <= 1.05 * SIZE


def test_a_fork_reads_with_connections_of_its_own(store: HttpStore, tmp_path: Path) -> None:
    shards = Shards(store.url, cache_config(tmp_path))
    shards.read("shard-0.tar", spans(0))
    shards.prefetch([("shard-0.tar", spans(number)) for number in range(50)])
    pid = os.fork()
    if pid == 0:
        os._exit(0 if shards.read("shard-1.tar", spans(1)) == expected(1, 1) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert shards.read("shard-1.tar", spans(2)) == expected(1, 2)


def test_a_remote_catalogue_is_copied_once_for_each_state(store: HttpStore, tmp_path: Path) -> None:
    cache = cache_config(tmp_path)
    with pytest.raises(FileNotFoundError):
        fetch_catalogue(store.url, cache)
    (store.folder / "manifest.json").write_text('{"shards": {"shard-0.tar": {}}}')
    (store.folder / "shard-0.tar.parquet").write_bytes(b"first")
    folders = [fetch_catalogue(store.url, cache) for _ in range(3)]
    assert folders[0] == folders[2] and store.requests["GET shard-0.tar.parquet"] == 1
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["manifest.json", "shard-0.tar.parquet"]
    (store.folder / "manifest.json").write_text('{"shards": {"shard-0.tar": {"new": 1}}}')
    (store.folder / "shard-0.tar.parquet").write_bytes(b"second")
    again = fetch_catalogue(store.url, cache)
    assert (again / "shard-0.tar.parquet").read_bytes() == b"second" != again
    assert fetch_catalogue(store.folder, cache) == store.folder
    for text, message in (
        ('{"shards": {"../../x": {}}}', "no file name"),
        ('{"shards": ', "damaged"),
        ("[]", "damaged"),
    ):
        (store.folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            fetch_catalogue(store.url, cache)
