"""`longtake index` over processes: killed and resumed, shards reused, catalogues of URLs."""

import http.server
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from longtake.data.catalogue import (
    build_catalogue,
    index_run,
    index_shards,
    load_catalogue,
    open_manifest,
    read_parts,
)
from longtake.data.catalogue.indexing import ShardIndex, index_shard
from longtake.data.process_map import map_processes
from longtake.data.shards import ShardWriter
from tests.data.toy import toy_meta, toy_video, write_shards


def small_set(folder: Path, num_shards: int = 5, per_shard: int = 2) -> Path:
    samples = [
        (f"k{i:03d}", {"mp4": toy_video(i), "json": toy_meta(i)})
        for i in range(num_shards * per_shard)
    ]
    return write_shards(folder, samples, per_shard)


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "catalogue").glob("*.parquet")}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were really scanned."""
    names: list[str] = []

    def count(path: Path, dataset: str, **options: str) -> ShardIndex:
        names.append(path.name)
        return index_shard(path, dataset, **options)

    monkeypatch.setattr(index_run, "index_shard", count)
    return names


def test_equal_files_at_any_number_of_workers(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    made = []
    for workers in (1, 2, 3):
        manifest = index_shards(shards, num_workers=workers, progress=False, fresh=True)
        made.append((manifest.fingerprint, parts(shards)))
    assert made[0] == made[1] == made[2] and len(made[0][1]) == 5


def test_only_new_and_changed_shards_are_scanned(tmp_path: Path, counted: list[str]) -> None:
    index = partial(index_shards, num_workers=1, progress=False)
    shards = small_set(tmp_path, 3)
    first = index(shards)
    assert len(counted) == 3
    counted.clear()
    assert index(shards).fingerprint == first.fingerprint and counted == []
    with ShardWriter(shards, start=3) as writer:
        writer.write("late", {"mp4": toy_video(9), "json": toy_meta(9)})
    os.utime(shards / "shard-000001.tar", ns=(1, 1))
    grown = index(shards)
    assert counted == ["shard-000001.tar", "shard-000003.tar"] and grown.num_samples == 7
    counted.clear()
    (shards / "shard-000003.tar").unlink()
    assert index(shards).fingerprint == first.fingerprint and counted == []
    assert sorted(parts(shards)) == [f"shard-00000{i}.tar.parquet" for i in range(3)]
    index(shards, probe="full")
    assert len(counted) == 3, "rows depend on how clips were probed"
    counted.clear()
    index(shards, probe="full", fresh=True)
    assert len(counted) == 3


def test_a_damaged_part_is_made_again(tmp_path: Path, counted: list[str]) -> None:
    shards = small_set(tmp_path, 2)
    first = index_shards(shards, num_workers=1, progress=False)
    part = shards / "catalogue" / "shard-000001.tar.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    counted.clear()
    assert index_shards(shards, num_workers=1, progress=False) == first
    assert counted == ["shard-000001.tar"]
    load_catalogue(shards)


def test_every_damaged_shard_is_named_and_the_others_are_kept(
    tmp_path: Path, counted: list[str]
) -> None:
    shards = small_set(tmp_path)
    whole = {}
    for number in (1, 3):
        path = shards / f"shard-00000{number}.tar"
        whole[path] = path.read_bytes()
        path.write_bytes(whole[path][:3000])
    with pytest.raises(ValueError, match=r"(?s)shard-000001.*cut at byte.*shard-000003.*cut"):
        index_shards(shards, num_workers=1, progress=False)
    assert not (shards / "catalogue").exists()
    counted.clear()
    for path, data in whole.items():
        path.write_bytes(data)
    assert index_shards(shards, num_workers=1, progress=False).num_samples == 10
    assert counted == ["shard-000001.tar", "shard-000003.tar"]
    assert [p.name for p in shards.iterdir() if "catalogue" in p.name] == ["catalogue"]
    assert all(path.suffix in (".json", ".parquet") for path in (shards / "catalogue").iterdir())


SLOW_INDEX = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell hands down SIG_IGN
from longtake.data.catalogue import index_run
from longtake.data.catalogue import index_shards
real = index_run.index_shard
def slow(path, dataset, **options):
    if path.name == "shard-000003.tar":
        print("waiting", flush=True)
        time.sleep(600)
    return real(path, dataset, **options)
index_run.index_shard = slow
index_shards(sys.argv[1], num_workers=2, progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_leaves_no_process(
    tmp_path: Path, counted: list[str], number: signal.Signals
) -> None:
    shards = small_set(tmp_path, 4)
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_INDEX, str(shards)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == b"waiting\n"
        journal = shards / "catalogue.partial" / ".journal.jsonl"
        while len(journal.read_text().splitlines()) < 4:  # the options and three shards
            time.sleep(0.01)
        run.send_signal(number)
        run.wait(timeout=30)
    deadline = time.monotonic() + 30
    while _is_group_alive(run.pid):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    with open(journal, "a") as file:
        file.write('{"name": "shard-0000')  # as a kill in the middle of a line leaves it
    assert index_shards(shards, num_workers=1, progress=False).num_samples == 8
    assert counted == ["shard-000003.tar"]
    assert parts(shards).keys() == {f"shard-00000{i}.tar.parquet" for i in range(4)}


def _is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    shards = small_set(tmp_path, 1)
    with index_run._locked(shards / "catalogue.partial"):
        with pytest.raises(ValueError, match="another `longtake index` is at work"):
            index_shards(shards, num_workers=1, progress=False)


def test_a_shard_that_changes_meanwhile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = small_set(tmp_path, 1)

    def change(path: Path, dataset: str, **options: str) -> ShardIndex:
        found = index_shard(path, dataset, **options)
        os.utime(path, ns=(5, 5))
        return found

    monkeypatch.setattr(index_run, "index_shard", change)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: changed while it was indexed"):
        index_shards(shards, num_workers=1, progress=False)


def test_equal_ids_of_other_keys_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longtake.data.catalogue import indexing

    shards = small_set(tmp_path, 2)
    monkeypatch.setattr(indexing, "name_hash", lambda dataset, name: 7)
    with pytest.raises(ValueError, match=r"'k000' in .* and 'k001' in .* one 64-bit sample id"):
        index_shards(shards, num_workers=1, progress=False)


def test_full_probe_decodes_every_frame(tmp_path: Path) -> None:
    good, bad = toy_video(0, 33), bytearray(toy_video(1, 33))
    start = bad.index(b"mdat") + 4
    middle = start + (len(bad) - start) // 3
    bad[middle : middle + 300] = bytes(300)
    samples = [(k, {"mp4": bytes(v), "json": toy_meta(0)}) for k, v in (("a", good), ("b", bad))]
    shards = write_shards(tmp_path, samples)
    assert index_shards(shards, num_workers=1, progress=False).num_samples == 2
    full = index_shards(shards, num_workers=1, progress=False, probe="full")
    (entry,) = full.rejections()
    assert entry["key"] == "b" and full.num_samples == 1
    row = read_parts(full, ["shard-000000.tar"]).to_pylist()[0]
    assert (row["frames"], row["width"], row["height"]) == (33, 32, 32)
    with pytest.raises(ValueError, match="probe='half'"):
        index_shards(shards, probe="half")


def test_parts_are_read_by_name_and_column(tmp_path: Path) -> None:
    shards = small_set(tmp_path, 3)
    manifest = index_shards(shards, num_workers=1, progress=False)
    names = ["shard-000002.tar", "shard-000000.tar"]
    table = read_parts(manifest, names, ["key", "frames"])
    assert table.column_names == ["key", "frames"]
    assert table["key"].to_pylist() == ["k004", "k005", "k000", "k001"]
    assert read_parts(manifest, []).num_rows == 0
    whole = load_catalogue(shards).table
    assert read_parts(manifest, list(manifest.shards)).equals(whole)
    assert {name: entry.samples for name, entry in manifest.shards.items()} == {
        f"shard-00000{i}.tar": 2 for i in range(3)
    }


def test_parts_that_were_exchanged_or_altered_are_refused(tmp_path: Path) -> None:
    shards = small_set(tmp_path, 2)
    manifest = index_shards(shards, num_workers=1, progress=False)
    one, two = (shards / "catalogue" / f"shard-00000{i}.tar.parquet" for i in (0, 1))
    one.write_bytes(two.read_bytes())
    with pytest.raises(ValueError, match="not those of the manifest"):
        read_parts(manifest, ["shard-000000.tar"])
    read_parts(manifest, ["shard-000001.tar"])


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A web server that does not print."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder of shards, and its URL."""
    folder = small_set(tmp_path / "served", 3)
    handler = partial(Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/served"
    server.shutdown()
    thread.join()
    server.server_close()


def test_shards_of_a_web_server(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, url = served
    with pytest.raises(ValueError, match="give --out"):
        index_shards(url, progress=False)
    out = tmp_path / "apart"
    manifest = index_shards(url, out=out, dataset="d", num_workers=1, progress=False)
    local = build_catalogue(folder, dataset="d", num_workers=1, progress=False)
    assert manifest.fingerprint == local.fingerprint and manifest.root == url
    known = load_catalogue(url, out)
    assert known.table.equals(local.table) and known.root == url
    assert open_manifest(url).fingerprint == local.fingerprint, "its own catalogue, fetched"
    (folder / "shard-000001.tar").write_bytes(b"\1" * 700)
    with pytest.raises(ValueError, match=rf"{url}/shard-000001\.tar: damaged tar header"):
        index_shards(url, out=out, dataset="d", num_workers=1, progress=False)


def test_results_of_processes_come_from_other_processes() -> None:
    seen = set(map_processes(_pid, range(8), 2))
    assert os.getpid() not in {pid for _, pid in seen}
    assert {number for number, _ in seen} == set(range(8))
    assert {number for number, _ in map_processes(_pid, range(3), 1)} == {0, 1, 2}
    with pytest.raises(ChildProcessError, match="killed"):
        list(map_processes(_die, range(4), 2))
    for _ in map_processes(_pid, range(50), 2):
        break
    assert not multiprocessing.active_children()


def _pid(number: int) -> tuple[int, int]:
    return number, os.getpid()


def _die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_ids_of_many_shards_need_little_memory(tmp_path: Path) -> None:
    """The check for repeated keys: 2 M samples of 4000 shards, and the one repetition is found."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2**64, 2_000_000, dtype=np.uint64)
    facts = [
        index_run.ShardFacts(
            index_run.ShardState(f"{i}.tar", 1), "", 0, {}, ids[i * 500 : (i + 1) * 500].tobytes()
        )
        for i in range(4000)
    ]
    index_run._check_ids(facts, tmp_path, tmp_path)


def test_old_catalogues_say_what_to_do(tmp_path: Path) -> None:
    shards = small_set(tmp_path, 1)
    index_shards(shards, num_workers=1, progress=False)
    manifest = shards / "catalogue" / "manifest.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**tree, "schema_version": 1}))
    with pytest.raises(ValueError, match="schema_version=1, this version reads 2; run `longtake"):
        open_manifest(shards)
    assert index_shards(shards, num_workers=1, progress=False).num_samples == 2
