"""Copies of checkpoints on a store: whole or not there, kept like the local ones, fetched back."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from longtake.data.config import CacheConfig
from longtake.train import checkpoint
from longtake.train.checkpoint import CheckpointError, Keep, load_full
from longtake.train.checkpoint_copy import CheckpointCopies, copy_url
from longtake.train.checkpoint_writer import BackgroundWriter
from longtake.train.ema import Ema, EmaConfig
from longtake.train.engine import Ranks, single_process
from longtake.train.run_folder import read_marker
from tests.train import tiny
from tests.train.forked import import_before_fork, run_ranks
from tests.train.tiny_runs import losses, options, train_here, write_splits

URL = "moody://bucket/run"
ONCE = CacheConfig(retries=0)
SHORT = "train.steps=4", "train.checkpoint_every=2", "data.cache.retries=0"


class MoodyStore(MemoryFileSystem):
    """A store in this process whose `mood` meets every write, and every read where `silent`."""

    protocol = "moody"
    mood: Callable[[str, bytes], bytes] | None = None
    silent = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("moody://"))

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        mood = type(self).mood
        super().pipe_file(path, mood(path, value) if mood else value, **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def ls(self, path: str, **options: Any) -> Any:
        if self.silent:
            raise ConnectionError("no route to the store")
        return super().ls(path, **options)


def full(path: str, data: bytes) -> bytes:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(path: str, data: bytes) -> bytes:
    raise PermissionError(errno.EACCES, "read-only bucket")


def truncating(path: str, data: bytes) -> bytes:
    return data[:-1] if path.endswith(".safetensors") else data


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    fsspec.register_implementation("moody", MoodyStore, clobber=True)
    yield MoodyStore.store
    MoodyStore.store.clear()
    MoodyStore.pseudo_dirs[:] = [""]
    MoodyStore.mood, MoodyStore.silent = None, False


def names(store: dict[str, Any]) -> set[str]:
    return {path.split("/")[3] for path in store}


class Run:
    """One rank that trains a step, saves it, and waits for its copy."""

    def __init__(
        self, folder: Path, keep: Keep, ranks: Ranks | None = None, url: str = URL
    ) -> None:
        ranks = ranks or single_process()
        self.engine = tiny.build(ranks, "ddp")
        self.ema = Ema(self.engine, EmaConfig(0.9))
        self.copies = CheckpointCopies(folder, url, ranks, keep, ONCE)
        self.writer = BackgroundWriter(folder, ranks, keep, self.copies)

    def step_to(self, *steps: int) -> None:
        for step in steps:
            tiny.train(self.engine, range(step, step + 1), ema=self.ema)
            state, config = {"step": step, "samples_seen": step}, {}
            self.writer.start(step, self.engine, self.ema, None, state, config)
            self.writer.finish()
            assert self.copies._job is not None
            self.copies._job.result()


def fetch(folder: Path, last: Path | None = None) -> Path:
    found = CheckpointCopies(folder, URL, single_process(), Keep(), ONCE).fetch_newer(last)
    assert found is not None
    return found


def equal(one: Path, other: Path) -> bool:
    mine, yours = load_full(one), load_full(other)
    return all(torch.equal(mine[name], yours[name]) for name in mine.keys() | yours.keys())


def test_copies_are_kept_like_checkpoints_and_fetched_back(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    run = Run(tmp_path / "here", Keep(last=2, every=4))
    run.step_to(*range(3, 8))
    kept = {"step-00000004", "step-00000006", "step-00000007"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == names(store) == kept
    assert run.copies.failures == 0
    there = fetch(tmp_path / "there")
    assert there == tmp_path / "there" / "step-00000007"
    assert equal(there, tmp_path / "here" / "step-00000007")
    assert fetch(tmp_path / "there", there) == there  # nothing newer
    Run(tmp_path / "new", Keep(last=3)).step_to(8)  # knows nothing of the older ones but the rule
    assert names(store) == {"step-00000006", "step-00000007", "step-00000008"}


@pytest.mark.parametrize("mood", [full, read_only, truncating])
def test_a_store_that_fails_is_told_and_tried_again(
    tmp_path: Path, store: dict[str, Any], caplog: pytest.LogCaptureFixture, mood: Any
) -> None:
    run = Run(tmp_path / "here", Keep(last=1, every=3))
    run.step_to(1)
    MoodyStore.mood = mood
    run.step_to(2, 3, 4)
    assert run.copies.failures == 3
    assert [f"checkpoint {n} was not copied to {URL}" in caplog.text for n in (2, 3, 4)]
    assert len(caplog.records) == 3
    MoodyStore.mood = None
    last = fetch(tmp_path / "there")
    assert last.name == "step-00000001"  # no failure costs the last good one
    run.step_to(5)
    assert names(store) == {"step-00000003", "step-00000005"}  # 3 made up for, halves are gone
    assert run.copies.failures == 3


def test_a_slow_store_holds_nobody_up(
    tmp_path: Path, store: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, go = Run(tmp_path / "here", Keep(last=1)), threading.Event()
    MoodyStore.mood = lambda path, data: data if go.wait(60) else b""
    for step in (1, 2, 3):
        run.writer.start(step, run.engine, run.ema, None, {"step": step}, {})
        run.writer.finish()
        wait_until(lambda: run.copies.in_hand == 1)
    here = {path.name for path in (tmp_path / "here").iterdir()}
    assert here == {"step-00000001", "step-00000003"}  # the first is still needed
    go.set()
    run.writer.close()
    assert names(store) == {"step-00000003"} and run.copies.failures == 0


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def flipped(store: dict[str, Any], path: str) -> None:
    data = bytearray(store[path].getvalue())
    data[-9] ^= 1
    MoodyStore().pipe_file(path, bytes(data))


def hostile(store: dict[str, Any], path: str) -> None:
    manifest = json.loads(store[path].getvalue())
    del manifest["sha256"]
    manifest["files"]["../../escaped"] = manifest["files"]["config.json"]
    sealed = manifest | {"sha256": checkpoint.seal(manifest)}
    MoodyStore().pipe_file(path, json.dumps(sealed).encode())


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        ("rank-00000.safetensors", flipped, "differs from its sha256"),
        ("rank-00000.safetensors", lambda store, path: store.pop(path), "cannot be read"),
        ("manifest.json", flipped, "manifest.json"),
        ("manifest.json", hostile, "names files outside its folder"),
    ],
)
def test_a_damaged_copy_is_passed_over_for_the_one_before(
    tmp_path: Path,
    store: Any,
    caplog: pytest.LogCaptureFixture,
    file: str,
    damage: Any,
    problem: str,
) -> None:
    Run(tmp_path / "here", Keep()).step_to(1, 2)
    damage(store, f"/bucket/run/step-00000002/{file}")
    found = fetch(tmp_path / "there")
    assert found == tmp_path / "there" / "step-00000001"
    assert f"{URL}/step-00000002 is passed over" in caplog.text and problem in caplog.text
    assert {path.name for path in (tmp_path / "there").iterdir()} == {found.name}


def test_a_silent_store_stops_only_who_has_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run(tmp_path / "here", Keep()).step_to(1)
    MoodyStore.silent = True
    last = tmp_path / "here" / "step-00000001"
    assert fetch(tmp_path / "here", last) == last
    assert "no route to the store" in caplog.text
    with pytest.raises(CheckpointError, match=r"moody://bucket/run cannot be read and there is no"):
        fetch(tmp_path / "there")


def test_only_what_can_hold_copies_is_named(tmp_path: Path) -> None:
    for target, problem in {
        "zip://a::s3://bucket": "chains",
        "https://host/run": "cannot be written",
        "ftp://me:word@host/run": "no password",
        "nowhere://bucket": "nowhere",
        f"{tmp_path}/run/copies": "lies in output_dir",
    }.items():
        with pytest.raises(ValueError, match=r"train\.checkpoint_copy.*" + problem):
            copy_url(target, tmp_path / "run")
    assert copy_url(f"{tmp_path}/copies", tmp_path / "run") == f"file://{tmp_path}/copies"


def copy_and_fetch(ranks: Ranks, folder: str) -> list[Any]:
    url = f"file://{folder}/copies"
    run = Run(Path(folder, "here"), Keep(last=1), ranks, url)
    run.step_to(1, 2)
    fetched = CheckpointCopies(Path(folder, "there"), url, ranks, Keep(), ONCE).fetch_newer(None)
    return [str(fetched), run.copies.failures]


@pytest.mark.dist
def test_ranks_divide_the_files(tmp_path: Path) -> None:
    import_before_fork()
    there = tmp_path / "there" / "step-00000002"
    assert run_ranks(2, copy_and_fetch, str(tmp_path)) == [[str(there), 0]] * 2
    assert {path.name for path in (tmp_path / "copies").iterdir()} == {there.name}
    assert equal(there, tmp_path / "here" / there.name)


def test_a_run_goes_on_from_its_copies_on_another_machine(tmp_path: Path) -> None:
    write_splits(tmp_path, 24, 4)
    here, there, copies = (tmp_path / name for name in ("here", "there", "copies"))
    more = f"train.checkpoint_copy={copies}", *SHORT
    assert train_here(options(tmp_path, here, *more)) == 0
    assert losses(here, "copy_failures")[4] == 0
    (copies / "step-00000004" / "manifest.json").unlink()  # the machine was lost before
    assert train_here(options(tmp_path, there, *more, "resume=never")) == 1
    assert "already holds checkpoints" in (there / "FAILED").read_text()
    assert train_here(options(tmp_path, there, *more, "seed=1")) == 1
    assert "seed: 0 -> 1" in (there / "FAILED").read_text()
    assert train_here(options(tmp_path, there, *more)) == 0
    assert min(losses(there)) == 3
    assert equal(*(path / "checkpoints" / "step-00000004" for path in (here, there)))

    MoodyStore.mood = full
    lost = tmp_path / "lost"
    assert train_here(options(tmp_path, lost, f"train.checkpoint_copy={URL}", *more[1:])) == 0
    assert read_marker(lost) == "FINISHED" and losses(lost, "copy_failures")[4] >= 1
