"""The plan over ten million samples: `python -m tests.bench.bench_plan [--rows N] [--keep FOLDER]`.

Writes a synthetic catalogue (empty sparse files stand in for the tars), compiles it, then opens it
in fresh processes as a starting and as a resuming run would.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longtake.data.catalogue.index_run import FACTS, MANIFEST
from longtake.data.catalogue.indexing import SCHEMA, SCHEMA_VERSION
from tests.data.toy import synthetic_catalogue

ROWS_PER_SHARD = 500
SHAPES = [(121, 720, 1280), (121, 1280, 720), (65, 480, 848), (65, 480, 480), (1, 1024, 1024)]

OPEN = """
import json, resource, sys, time
import numpy as np
import psutil
import torch
from longtake.data.plan import BucketConfig, DataConfig, DatasetConfig, Plan
from longtake.data.config import CacheConfig, GridConfig
process = psutil.Process()
before = process.memory_info().rss
root, step = sys.argv[1], int(sys.argv[2])
config = DataConfig(
    train=[DatasetConfig(root + "/shards", where="frames > 1 OR width > 512")],
    grid=GridConfig([1, 65, 121], [256 * 256, 480 * 480], 16, 2.0, batch_size=2),
    shuffle_shards=16,
    cache=CacheConfig(folder=root + "/cache"),
)
start = time.perf_counter()
plan = Plan.from_config(config, 0)
first = plan.step(step)
seconds = time.perf_counter() - start
rss = process.memory_info().rss - before
start = time.perf_counter()
for k in range(step + 1, step + 201):
    plan.step(k)
each = (time.perf_counter() - start) / 200 / sum(len(b.samples) for b in first)
walked = process.memory_info().rss - before
same = []
for bucket in np.argsort(plan.lanes[0].totals)[-3:].tolist():
    rows = [plan.lanes[0].locate(bucket, 3, i).row for i in range(8000, 16000)]
    same.append(float((np.diff(plan.tables[0].rows["shard"][rows]) == 0).mean()))
print(json.dumps({
    "seconds": seconds, "rss_mb": rss / 1e6, "rss_after_200_steps_mb": walked / 1e6,
    "sample_us": each * 1e6, "same_shard": same, "samples": plan.num_samples,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
}))
"""


def main() -> None:
    """Print what compiling and opening cost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--keep", type=Path, help="keep the catalogue here for another call")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = args.keep or Path(scratch)
        if not (root / "shards" / "catalogue" / "manifest.json").is_file():
            start = time.perf_counter()
            write_catalogue(root / "shards", args.rows // ROWS_PER_SHARD)
            print(f"catalogue of {args.rows:,} rows written in {time.perf_counter() - start:.0f} s")
        report(root, args.rows)


def report(root: Path, num_rows: int) -> None:
    """Compile (unless it is), then open twice in fresh processes."""
    compiled = open_plan(root, 0)
    folder = root / "cache" / "plans"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    bigger = 1e9 / num_rows
    print(
        f"compile: {compiled['seconds']:.1f} s, {size / 1e6:.0f} MB on disk "
        f"({size / num_rows:.0f} B a row), peak {compiled['peak_mb']:.0f} MB; at 1 B rows by "
        f"proportion {compiled['seconds'] * bigger / 3600:.1f} h, {size * bigger / 1e9:.0f} GB"
    )
    for name, step, bar in (("first step", 0, 2.0), ("resume at step 1,000,000", 10**6, 1.0)):
        found = open_plan(root, step)
        print(
            f"{name}: {found['seconds']:.2f} s (bar {bar} s), {found['rss_mb']:.0f} MB above the "
            f"imports (bar 80 MB; {found['rss_after_200_steps_mb']:.0f} MB 200 steps later), "
            f"{found['sample_us']:.1f} us a sample"
        )
    ratios = ", ".join(f"{p * 16:.2f}" for p in found["same_shard"])
    print(f"P(next sample from the same shard) / ideal 1/16, by bucket: {ratios} (bar 1.1)")


def open_plan(root: Path, step: int) -> dict:
    """What a fresh process measures."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(root), str(step)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def write_catalogue(shards: Path, num_shards: int) -> None:
    """A catalogue with its manifest, and sparse files of the sizes that it claims."""
    folder = shards / "catalogue"
    folder.mkdir(parents=True)
    names = [f"shard-{index:06d}.tar" for index in range(num_shards)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        list(pool.map(partial(write_part, folder), range(num_shards), names, chunksize=100))
    entry = {"samples": ROWS_PER_SHARD, "bytes": 2**30, "rejected": 0, "digest": "0"}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "dataset": "synthetic",
        "fingerprint": "0",
        "passed_over": {},
        "shards": dict.fromkeys(names, entry),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for name in names:
        with open(shards / name, "wb") as file:
            file.truncate(2**30)


def write_part(folder: Path, index: int, name: str) -> None:
    """One shard's rows."""
    table = synthetic_catalogue([ROWS_PER_SHARD], SHAPES, fps=24.0, seed=index).table
    columns = dict(zip(table.column_names, table.columns, strict=True))
    keys = [f"{name[:-4]}/clip{i:04d}" for i in range(ROWS_PER_SHARD)]
    ids = np.random.default_rng(index).integers(0, 2**63, ROWS_PER_SHARD, dtype=np.uint64)
    columns |= {
        "key": pa.array(keys),
        "sample_id": pa.array(ids),
        "shard": pa.array([name] * ROWS_PER_SHARD),
    }
    facts = json.dumps({"digest": "0", "rejected": [], "passed_over": {}})
    schema = SCHEMA.with_metadata({FACTS: facts})
    table = pa.table([columns[field.name].cast(field.type) for field in SCHEMA], schema=schema)
    pq.write_table(table, folder / f"{name}.parquet", compression="zstd")


if __name__ == "__main__":
    main()
