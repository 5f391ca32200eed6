import gc
import multiprocessing
import os
import signal
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.data import loader
from longtake.data.config import CacheConfig
from longtake.data.loader import Batch, Loader, Position, next_position
from longtake.data.plan import Plan, rank_slots
from longtake.data.plan.planned import PlannedSample
from longtake.data.reader import Clip, SampleReader
from longtake.data.shards import remote
from longtake.data.shards.storage import StorageError
from tests.data.http_store import serve
from tests.data.test_loader import content_of, flip_payload, load, loader_config
from tests.data.toy import toy_dataset

STEPS = 6


def remote_plan(url: str, folder: Path, seed: int = 5, **cache: object) -> Plan:
    """The plan of a dataset behind a URL, with a node cache of its own."""
    settings = {"folder": str(folder), "retries": 2, **cache}
    config = loader_config(Path("unused"), cache=CacheConfig(**settings))  # type: ignore[arg-type]
    config = replace(config, train=[replace(config.train[0], path=url)])
    return Plan.from_config(config, seed)


def joined(ranks: list[list[list[Batch]]]) -> list[list[Batch]]:
    """The global steps of what each rank loaded."""
    return [list(chain(*batches)) for batches in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("slots", "turns"), [(range(4), 1), (range(2, 5), 2), (range(7, 8), 3)])
def test_positions(slots: range, turns: int) -> None:
    walked = [Position(9, slots.start)]
    for _ in range(30):
        walked.append(next_position(walked[-1], slots, 1))
    assert walked[: len(slots)] == [Position(9, slot) for slot in slots]
    assert walked[len(slots)] == Position(10, slots.start)
    for one, two in zip(walked, walked[turns:], strict=False):
        assert next_position(one, slots, turns) == two


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_killed_workers_change_no_bit(num_workers: int, tmp_path: Path) -> None:
    catalogue = toy_dataset(tmp_path)
    flip_payload(catalogue, "clip0005")
    flip_payload(catalogue, "clip0011", "meta")
    timeout = 60.0 if num_workers == 2 else None  # with a child of its own for each worker
    plan = Plan.from_config(loader_config(tmp_path, crop="random", decode_timeout=timeout), 7)
    reference = load(plan, STEPS)
    assert any(batch.excluded for batches in reference for batch in batches)
    rng = np.random.default_rng(num_workers)
    found = []
    with pytest.warns(RuntimeWarning, match=r"SIGKILL\) at step \d+, slot \d+ or soon after"):
        for batches in islice(Loader(plan, range(4), num_workers=num_workers), STEPS):
            found.append(batches)
            if len(found) % 2:
                victims = multiprocessing.active_children()
                os.kill(victims[rng.integers(len(victims))].pid or 0, signal.SIGKILL)
    assert content_of(found) == content_of(reference)
    assert not multiprocessing.active_children()


def test_a_position_that_always_kills_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_dataset(tmp_path)
    plan = Plan.from_config(loader_config(tmp_path), 7)
    fatal = plan.micro_batch(2, 1).samples[0].key
    safe, read = load(plan, 2), SampleReader.read

    def kill(self: SampleReader, sample: PlannedSample) -> Clip:
        if sample.key == fatal and sample.visit == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, sample)

    monkeypatch.setattr(SampleReader, "read", kill)
    batches = iter(Loader(plan, range(4), num_workers=2))
    with pytest.warns(RuntimeWarning):
        assert content_of([next(batches), next(batches)]) == content_of(safe)
        with pytest.raises(ChildProcessError, match="3 times in a row at step 2, slot 1, last by"):
            next(batches)
    assert not multiprocessing.active_children()


def test_no_process_is_left(tmp_path: Path) -> None:
    toy_dataset(tmp_path)
    plan = Plan.from_config(loader_config(tmp_path), 7)
    source = Loader(plan, range(4), num_workers=2)
    batches = iter(source)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    source.close()
    assert not multiprocessing.active_children()
    batches = iter(Loader(plan, range(4), num_workers=2))
    next(batches)
    del batches  # as a trainer drops one for another that knows new exclusions
    gc.collect()
    assert not multiprocessing.active_children()


def test_pinning_changes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_dataset(tmp_path)
    plan = Plan.from_config(loader_config(tmp_path), 7)
    reference = load(plan, 3)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self.clone())
    for num_workers in (0, 2):
        found = load(plan, 3, num_workers=num_workers, pin=True)
        assert content_of(found) == content_of(reference)
        assert len(pinned) >= 12
        pinned.clear()
    assert not multiprocessing.active_children()


def test_errors_of_a_worker_keep_their_kind(tmp_path: Path) -> None:
    catalogue = toy_dataset(tmp_path, 8)
    plan = Plan.from_config(loader_config(tmp_path, slots=2), 0)
    for key in catalogue.table.column("key").to_pylist():
        flip_payload(catalogue, key)
    with pytest.raises(ValueError, match=r"at step 0, slot 0[\s\S]*no replacement is left"):
        load(plan, 1, num_workers=1)


def test_fewer_samples_or_shards_than_readers(tmp_path: Path) -> None:
    toy_dataset(tmp_path, 8)  # one shard of 8, which one step of 4 x 2 takes up
    plan = Plan.from_config(loader_config(tmp_path), 7)
    reference = load(plan, 4)
    parts = [
        load(plan, 4, slots=rank_slots(4, rank, 4), num_workers=3)  # 12 readers of 8 samples
        for rank in range(4)
    ]
    assert content_of(joined(parts)) == content_of(reference)
    with pytest.raises(ValueError, match=r"micro_batches_per_step=4 must be a multiple of the 8"):
        rank_slots(4, 0, 8)
    toy_dataset(tmp_path / "few", 7)
    with pytest.raises(ValueError, match="can never fill: 7 samples fit it"):
        Plan.from_config(loader_config(tmp_path / "few"), 7)


@pytest.mark.parametrize(("world", "num_workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_remote_shards_give_the_same_batches_and_each_sample_travels_once(
    world: int, num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not num_workers:  # else readers go on into the next visit
        monkeypatch.setattr(loader, "_POSITIONS_AHEAD", 0)
    catalogue = toy_dataset(tmp_path / "clips", 48)
    flip_payload(catalogue, "clip0005")
    local = load(Plan.from_config(loader_config(tmp_path / "clips"), 5), 6)  # 48 samples
    size, sent, parts = sum(path.stat().st_size for path in tmp_path.glob("clips/*.tar")), 0, []
    with serve(tmp_path / "clips") as store:
        for rank in range(world):
            plan = remote_plan(store.url, tmp_path / f"node-{rank}")
            store.ranges.clear()
            parts.append(load(plan, 6, slots=rank_slots(4, rank, world), num_workers=num_workers))
            # The damaged sample comes once more, to be sure.
            assert len(store.ranges) <= len(set(store.ranges)) + 1
            sent += sum(stop - start for name, start, stop in store.ranges if "tar" in name)
    assert content_of(joined(parts)) == content_of(local)
    assert num_workers or sent <= 1.05 * size


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreachable_store_stops_the_run_and_excludes_nothing(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    toy_dataset(tmp_path / "clips")
    with serve(tmp_path / "clips") as store:
        plan = remote_plan(store.url, tmp_path / "node")
        batches = iter(Loader(plan, range(4), num_workers=num_workers))
        assert not any(batch.excluded for batch in next(batches))
        store.fault = lambda method, name: 503
        with pytest.raises(StorageError, match=r"shard-\d+\.tar: the server answers 503"):
            for step in batches:
                assert not any(batch.excluded for batch in step)
                for path in (tmp_path / "node/samples").glob("??/*"):
                    path.unlink()  # what was fetched ahead
