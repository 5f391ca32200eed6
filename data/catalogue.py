"""The catalogue: one Parquet file for each shard and a manifest, written by `longtake index`.

Tars are never read blindly: everything that plans or loads samples goes through a catalogue, which
names each member's place, size and hash.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from rich.progress import track

from longtake.data.catalogue_filters import apply_filter
from longtake.data.indexing import SCHEMA, SCHEMA_VERSION, ShardIndex, index_shard
from longtake.data.shards import list_shards

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Catalogue:
    """Samples of one dataset: `table` has a row for each, with the columns of indexing.SCHEMA."""

    root: Path
    table: pa.Table
    dataset: str
    fingerprint: str
    rejected: tuple[dict[str, str], ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    def rejections(self, limit: int = 20) -> list[str]:
        """Lines that say how many samples were rejected, and why the first `limit` of them were."""
        if not self.rejected:
            return []
        lines = [f"rejected {len(self.rejected)}:"]
        for entry in self.rejected[:limit]:
            lines.append(f"  {entry['shard']}: {entry['key']}: {entry['reason']}")
        if len(self.rejected) > limit:
            lines.append(f"  and {len(self.rejected) - limit} more, see {MANIFEST}")
        return lines

    def filter(self, where: str) -> "FilterReport":
        """Keep the rows for which an SQL expression over the columns holds.

        Raises:
            ValueError: the expression is invalid or leaves nothing.
        """
        if not where.strip():
            return FilterReport(self, len(self), {})
        table, dropped = apply_filter(self.table, where, f"dataset {self.dataset!r}")
        fingerprint = xxhash.xxh3_128_hexdigest(f"{self.fingerprint}|{where}".encode())
        kept = replace(self, table=table, fingerprint=fingerprint)
        return FilterReport(kept, len(kept), dropped)


@dataclass(frozen=True)
class FilterReport:
    """The filtered catalogue, its number of rows, and the rows that each clause dropped."""

    catalogue: Catalogue
    kept: int
    dropped: dict[str, int]


def build_catalogue(
    shards: Path | str,
    *,
    out: Path | None = None,
    dataset: str | None = None,
    num_workers: int = 2,
    progress: bool = True,
) -> Catalogue:
    """Index all tars of a folder into <shards>/catalogue (or `out`), replacing what was there.

    `dataset` (default: the folder's name) enters every sample_id. Samples that cannot be used are
    listed in the manifest with their reasons.

    Raises:
        ValueError: no folder or shards, a damaged shard, a key in two shards, or nothing usable.
    """
    shards = Path(shards)
    out = out or shards / "catalogue"
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise ValueError(f"{out}: is not a catalogue (no {MANIFEST}) and will not be replaced")
    dataset = dataset or shards.resolve().name
    indices = list(_index_all(list_shards(shards), dataset, num_workers, progress))
    _check_indices(indices, shards)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        _write(temporary, indices, dataset)
        old = out.with_name(f"{out.name}.old-{os.getpid()}")
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_catalogue(shards, out)


def load_catalogue(path: Path | str, catalogue: Path | str | None = None) -> Catalogue:
    """Read the catalogue of a folder of shards and check that it fits the tars that are there.

    Raises:
        ValueError: no folder, no catalogue, another schema; a shard is missing, new or changed.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder of shards")
    folder = Path(catalogue) if catalogue else path / "catalogue"
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder}: no catalogue; shards are not read without one: run `longtake index {path}`"
        )
    manifest = _read_manifest(folder, path)
    _check_shards(manifest, path)
    tables = [
        _read_part(folder / f"{name}.parquet", entry["samples"], path)
        for name, entry in manifest["shards"].items()
    ]
    return Catalogue(
        root=path,
        table=pa.concat_tables(tables).combine_chunks(),
        dataset=manifest["dataset"],
        fingerprint=manifest["fingerprint"],
        rejected=tuple(manifest["rejected"]),
    )


def refuse_equal_names(catalogues: Iterable[Catalogue]) -> None:
    """Sample ids derive from the dataset's name: two folders of one name would share ids, and so
    random draws and exclusions. One folder may be listed several times.

    Raises:
        ValueError: two folders have one name.
    """
    roots: dict[str, Path] = {}
    for catalogue in catalogues:
        root = roots.setdefault(catalogue.dataset, catalogue.root)
        if root.resolve() != catalogue.root.resolve():
            raise ValueError(
                f"{root} and {catalogue.root} are both named {catalogue.dataset!r}, so their "
                "samples would share ids; give one another name: "
                f"`longtake index {catalogue.root} --dataset NAME`"
            )


def _index_all(
    paths: list[Path], dataset: str, num_workers: int, progress: bool
) -> Iterator[ShardIndex]:
    work = partial(index_shard, dataset=dataset)
    show = partial(
        track, description="index shards", total=len(paths), disable=not progress, transient=False
    )
    if num_workers <= 1 or len(paths) == 1:
        yield from show(map(work, paths))
        return
    # Workers only read tars and demux: no torch, no Arrow, so a fork is safe and starts at once.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(num_workers, len(paths)), mp_context=context) as pool:
        yield from show(pool.map(work, paths))


def _check_indices(indices: list[ShardIndex], shards: Path) -> None:
    seen: dict[str, str] = {}
    for index in indices:
        for row in index.rows:
            if row["key"] in seen:
                raise ValueError(
                    f"{shards}: key {row['key']!r} is in {seen[row['key']]} and in {index.name}; "
                    "keys of a dataset must be unique"
                )
            seen[row["key"]] = index.name
    if not seen:
        reasons = sorted({entry["reason"] for index in indices for entry in index.rejected})
        raise ValueError(f"{shards}: no usable sample in {len(indices)} shards: {reasons[:3]}")


def _write(folder: Path, indices: list[ShardIndex], dataset: str) -> None:
    folder.mkdir(parents=True)
    for index in indices:
        table = pa.Table.from_pylist(index.rows, schema=SCHEMA)
        pq.write_table(table, folder / f"{index.name}.parquet", compression="zstd")
    digests = [(index.name, index.digest) for index in indices]
    identity = json.dumps([SCHEMA_VERSION, dataset, digests])
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "dataset": dataset,
        "fingerprint": xxhash.xxh3_128_hexdigest(identity.encode()),
        "shards": {
            index.name: {"samples": len(index.rows), "bytes": index.num_bytes} for index in indices
        },
        "rejected": [entry for index in indices for entry in index.rejected],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _read_manifest(folder: Path, path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MANIFEST}: damaged: {error}; run `longtake index {path}`"
        ) from None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{folder}: schema_version={version}, this version reads {SCHEMA_VERSION}; "
            f"run `longtake index {path}`"
        )
    return manifest


def _check_shards(manifest: dict[str, Any], path: Path) -> None:
    listed = manifest["shards"]
    for name, entry in listed.items():
        shard = path / name
        if not shard.is_file():
            raise ValueError(
                f"{shard}: is in the catalogue but missing; run `longtake index {path}`"
            )
        if shard.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{shard}: has {shard.stat().st_size} bytes, the catalogue says {entry['bytes']}: "
                f"changed after indexing; run `longtake index {path}`"
            )
    for shard in list_shards(path):
        if shard.name not in listed:
            raise ValueError(f"{shard}: is not in the catalogue; run `longtake index {path}`")


def _read_part(part: Path, samples: int, path: Path) -> pa.Table:
    try:
        table = pq.read_table(part, schema=SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{part}: damaged: {error}; run `longtake index {path}`") from error
    if table.num_rows != samples:
        raise ValueError(
            f"{part}: has {table.num_rows} rows, the manifest says {samples}; "
            f"run `longtake index {path}`"
        )
    return table


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column without nulls as a NumPy array."""
    return table.column(name).to_numpy()
