"""Plans compiled into the node's cache say what plans in memory say, without reading again."""

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from longtake.data.catalogue import build_catalogue, load_catalogue
from longtake.data.config import CacheConfig
from longtake.data.plan import BucketConfig, DataConfig, DatasetConfig, Plan
from longtake.data.plan import compile as compiling
from tests.data.toy import toy_dataset


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    toy_dataset(tmp_path / "shards")
    return DataConfig(
        train=[DatasetConfig(str(tmp_path / "shards"))],
        buckets=[BucketConfig(9, 32, 32, 2), BucketConfig(5, 16, 16, 1, optional=True)],
        micro_batches_per_step=4,
        cache=CacheConfig(folder=str(tmp_path / "cache")),
    )


def _steps(plan: Plan) -> list[object]:
    return [plan.step(k) for k in range(12)]


def _compiled(config: DataConfig) -> list[Path]:
    folder = Path(config.cache.folder or "") / "plans"
    return [path for path in folder.iterdir() if path.is_dir()]


def test_compiled_and_in_memory_plans_agree(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = load_catalogue(config.train[0].path)
    reference = Plan.from_catalogues([catalogue], config, 5)
    plan = Plan.from_config(config, 5)
    assert _steps(plan) == _steps(reference) and plan.fingerprint == reference.fingerprint
    # In chunks of a shard, at another place.
    monkeypatch.setattr(compiling, "_ROWS_AT_ONCE", 8)
    other = replace(config, cache=CacheConfig(folder=f"{config.cache.folder}-2"))
    chunked = Plan.from_config(other, 5)
    assert _steps(chunked) == _steps(reference)
    for name in ("rows", "bucket", "bounds", "counts"):
        assert np.array_equal(getattr(chunked.tables[0], name), getattr(plan.tables[0], name))


def test_opening_reads_neither_rows_nor_compiles_again(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Plan.from_config(config, 5)

    def fail(*args: object) -> None:
        raise AssertionError("compiled twice")

    monkeypatch.setattr(compiling, "_compile", fail)
    monkeypatch.setattr(compiling, "read_parts", fail)
    again = Plan.from_config(replace(config, num_workers=3), 5)
    assert _steps(again) == _steps(first)
    assert isinstance(again.tables[0].rows.base, np.memmap | mmap)
    copied = pickle.loads(pickle.dumps(again.tables[0]))
    assert (
        isinstance(copied.rows.base, np.memmap | mmap)
        and copied.key(copied.record(3)) == "clip0003"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"buckets": [BucketConfig(9, 32, 32, 1)]},
        {"fps": 4.0, "buckets": [BucketConfig(3, 32, 32, 1)]},
        {"micro_batches_per_step": 2},
    ],
)
def test_another_config_is_another_compilation(config: DataConfig, change: dict) -> None:
    Plan.from_config(config, 5)
    Plan.from_config(replace(config, **change), 5)
    assert len(_compiled(config)) == 2


def test_another_filter_or_catalogue_is_another_compilation(config: DataConfig) -> None:
    Plan.from_config(config, 5)
    filtered = replace(config, train=[replace(config.train[0], where="key > 'clip0004'")])
    plan = Plan.from_config(filtered, 5)
    assert len(_compiled(config)) == 2 and plan.num_samples == 19
    assert "dropped, where key > 'clip0004': 5" in plan.summary()
    shutil.rmtree(config.train[0].path)
    toy_dataset(Path(config.train[0].path), num_clips=30)
    assert Plan.from_config(config, 5).num_samples == 30 and len(_compiled(config)) == 3


def test_a_filter_may_empty_a_part_but_not_a_dataset(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_ROWS_AT_ONCE", 8)  # a shard
    kept = replace(config.train[0], where="key >= 'clip0008'")
    plan = Plan.from_config(replace(config, train=[kept]), 5)
    assert plan.num_samples == 16 and plan.tables[0].info.dropped["where key >= 'clip0008'"] == 8
    nothing = replace(config.train[0], where="frames > 100")
    with pytest.raises(ValueError, match=r"dataset 'shards'.* no sample of 24 fits") as caught:
        Plan.from_config(replace(config, train=[config.train[0], nothing]), 5)
    assert "where frames > 100': 24" in str(caught.value)


@pytest.mark.parametrize("name", ["rows.bin", "keys.bin", "bucket.bin", "counts.npy", "info.json"])
@pytest.mark.parametrize("size", [0, 20, None])
def test_a_damaged_compilation_is_made_again(
    config: DataConfig, name: str, size: int | None
) -> None:
    expected = _steps(Plan.from_config(config, 5))
    (made,) = _compiled(config)
    if size is None:
        (made / "0" / name).unlink()
    else:
        os.truncate(made / "0" / name, size)
    assert _steps(Plan.from_config(config, 5)) == expected


def test_a_shard_of_another_size_is_another_compilation(config: DataConfig) -> None:
    """Its rows are the same, but reads are held to its size."""
    Plan.from_config(config, 5)
    shard = next(Path(config.train[0].path).glob("*.tar"))
    shard.write_bytes(shard.read_bytes() + bytes(10_240))
    build_catalogue(config.train[0].path, num_workers=1, progress=False)
    plan = Plan.from_config(config, 5)
    assert dict(plan.tables[0].info.shards)[shard.name] == shard.stat().st_size


def test_many_processes_compile_once(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = compiling._compile

    def counted(*args: object) -> None:
        calls.append(args)
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(compiling, "_compile", counted)
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: Plan.from_config(config, 5), range(4)))
    assert len(calls) == 1 and all(_steps(plan) == _steps(plans[0]) for plan in plans)


def test_a_killed_compilation_is_begun_anew(config: DataConfig) -> None:
    Plan.from_config(config, 5)
    (made,) = _compiled(config)
    made.rename(made.with_name(f"{made.name}.tmp"))
    (made.with_name(f"{made.name}.tmp") / "0" / "rows.bin").write_bytes(b"half")
    assert Plan.from_config(config, 5).num_samples == 24


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_cache_is_named(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    cache = CacheConfig(folder=str(tmp_path / "locked" / "cache"))
    with pytest.raises(ValueError, match=r"give another data\.cache\.folder"):
        Plan.from_config(replace(config, cache=cache), 5)


def test_a_cache_that_is_a_file_is_named(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = CacheConfig(folder=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"give another data\.cache\.folder"):
        Plan.from_config(replace(config, cache=cache), 5)
