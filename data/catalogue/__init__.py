"""The catalogue: one Parquet file for each shard and a manifest, written by `longtake index`.

Tars are never read blindly: everything that plans or loads samples goes through a catalogue, which
names each member's place, size and hash.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from longtake.data.catalogue.filters import apply_filter
from longtake.data.catalogue.index_run import (
    MANIFEST,
    IndexOptions,
    ShardState,
    part_name,
    read_facts,
    run_index,
)
from longtake.data.catalogue.indexing import PROBES, SCHEMA, SCHEMA_VERSION
from longtake.data.config import CacheConfig
from longtake.data.shards.storage import Root, fetch_catalogue, join, list_tars, parse_root


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of a tar: samples, size in bytes, digest of its rows, rejections."""

    samples: int
    bytes: int
    digest: str = ""
    rejected: int = 0


@dataclass(frozen=True)
class CatalogueManifest:
    """A catalogue without its rows: `root` holds the tars, `folder` the catalogue's files.

    `shards` is sorted by name, the order of the rows; `passed_over` counts members that belong to
    no sample, by extension.
    """

    root: Root
    folder: Path
    dataset: str
    fingerprint: str
    shards: dict[str, ShardEntry]
    passed_over: dict[str, int]

    @property
    def num_samples(self) -> int:
        """Rows of all shards."""
        return sum(entry.samples for entry in self.shards.values())

    @property
    def num_rejected(self) -> int:
        """Samples that cannot be used."""
        return sum(entry.rejected for entry in self.shards.values())

    def rejections(self, limit: int | None = None) -> Iterator[dict[str, str]]:
        """The first `limit` (None: all) rejected samples as {"shard", "key", "reason"}."""
        parts = (part_name(name) for name, entry in self.shards.items() if entry.rejected)
        found = (entry for part in parts for entry in read_facts(self.folder / part)["rejected"])
        return islice(found, limit)

    def remarks(self, limit: int = 20) -> list[str]:
        """Lines for the user: what was rejected and why, and which members were passed over."""
        lines = []
        if self.passed_over:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.passed_over.items())
            lines.append(f"passed over, as they belong to no sample: {kinds}")
        return lines + _rejection_lines(self.rejections(limit), self.num_rejected, limit)


@dataclass(frozen=True)
class Catalogue:
    """Samples of one dataset: `table` has a row for each, with the columns of indexing.SCHEMA."""

    root: Root
    table: pa.Table
    dataset: str
    fingerprint: str
    rejected: tuple[dict[str, str], ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    def rejections(self, limit: int = 20) -> list[str]:
        """Lines that say how many samples were rejected, and why the first `limit` of them were."""
        return _rejection_lines(self.rejected[:limit], len(self.rejected), limit)

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


def _rejection_lines(first: Iterable[dict[str, str]], count: int, limit: int) -> list[str]:
    if not count:
        return []
    lines = [f"  {entry['shard']}: {entry['key']}: {entry['reason']}" for entry in first]
    more = [f"  and {count - limit} more"] if count > limit else []
    return [f"rejected {count}:", *lines, *more]


def build_catalogue(
    shards: Path | str,
    *,
    out: Path | None = None,
    dataset: str | None = None,
    num_workers: int = 2,
    progress: bool = True,
) -> Catalogue:
    """`index_shards`, and read the result."""
    manifest = index_shards(
        shards, out=out, dataset=dataset, num_workers=num_workers, progress=progress
    )
    return _load(manifest)


def index_shards(
    shards: Path | str,
    *,
    out: Path | None = None,
    dataset: str | None = None,
    num_workers: int = 2,
    progress: bool = True,
    probe: str = "header",
    fresh: bool = False,
) -> CatalogueManifest:
    """Index the tars of a folder or URL into <shards>/catalogue (or `out`), which is replaced.

    `dataset` (default: the folder's name) enters every sample_id. Samples that cannot be used are
    kept out, with their reasons. Shards that neither changed since they were indexed (size and time
    of change) nor would be indexed otherwise are taken over, unless `fresh`. A run that is killed
    goes on where it was. `probe` full decodes every frame; header none of an MP4, and
    elsewhere the first, which alone tells its size on display.

    Raises:
        ValueError: no folder or shards, a damaged shard, a key in two shards, or nothing usable.
    """
    if probe not in PROBES:
        raise ValueError(f"probe={probe!r} must be one of {', '.join(PROBES)}")
    root = parse_root(shards)
    if out is None:
        if not isinstance(root, Path):
            raise ValueError(f"{root}: give --out, a local folder: a catalogue is not uploaded")
        out = root / "catalogue"
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise ValueError(f"{out}: is not a catalogue (no {MANIFEST}) and will not be replaced")
    name = root.resolve().name if isinstance(root, Path) else root.rpartition("/")[2]
    states = [
        ShardState(tar, size, (root / tar).stat().st_mtime_ns if isinstance(root, Path) else 0)
        for tar, size in list_tars(root)
    ]
    options = IndexOptions(dataset or name, probe)
    run_index(root, states, out, options, num_workers=num_workers, progress=progress, fresh=fresh)
    return open_manifest(root, out)


def open_manifest(
    path: Path | str, catalogue: Path | str | None = None, cache: CacheConfig | None = None
) -> CatalogueManifest:
    """The catalogue of a folder or URL of shards without its rows, checked against the tars there.

    The tars of a URL are not looked at one by one: reads find out.

    Raises:
        ValueError: no folder, no catalogue, another schema; a shard is missing, new or changed.
    """
    manifest = read_manifest(path, catalogue, cache)
    if isinstance(manifest.root, Path):
        for problem in compare_tars(manifest, manifest.root):
            raise ValueError(problem)
    return manifest


def read_manifest(
    path: Path | str, catalogue: Path | str | None = None, cache: CacheConfig | None = None
) -> CatalogueManifest:
    """As `open_manifest`, without a look at the tars."""
    root = parse_root(path)
    if isinstance(root, Path) and not root.is_dir():
        raise ValueError(f"{root}: no such folder of shards")
    home = parse_root(catalogue) if catalogue else join(root, "catalogue")
    try:
        folder = fetch_catalogue(home, cache or CacheConfig())
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{home}: no catalogue; shards are not read without one: run `longtake index {root}`"
        ) from None
    except UnicodeDecodeError as error:
        raise _damaged(folder / MANIFEST, error, root) from None
    try:
        tree = json.loads(text)
        version = tree["schema_version"]
        if version == SCHEMA_VERSION:
            return _parse_manifest(tree, root, folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder / MANIFEST, error, root) from None
    raise ValueError(
        f"{folder}: schema_version={version}, this version reads {SCHEMA_VERSION}; "
        f"run `longtake index {root}`"
    )


def compare_tars(manifest: CatalogueManifest, root: Path) -> Iterator[str]:
    """How a catalogue differs from the tars of its folder: missing, changed in size, new."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(root) if entry.is_file()}
    for name, entry in manifest.shards.items():
        if name not in sizes:
            yield f"{root / name}: is in the catalogue but missing; run `longtake index {root}`"
        elif sizes[name] != entry.bytes:
            yield (
                f"{root / name}: has {sizes[name]} bytes, the catalogue says {entry.bytes}: "
                f"changed after indexing; run `longtake index {root}`"
            )
    for name in sorted(sizes):
        if name.endswith(".tar") and name not in manifest.shards:
            yield f"{root / name}: is not in the catalogue; run `longtake index {root}`"


def load_catalogue(path: Path | str, catalogue: Path | str | None = None) -> Catalogue:
    """Read the catalogue of a folder or URL of shards, checked as by `open_manifest`.

    Raises:
        ValueError: as there, or a part of the catalogue is damaged.
    """
    return _load(open_manifest(path, catalogue))


def read_parts(
    manifest: CatalogueManifest, names: Sequence[str], columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of these shards in this order; `columns` None stands for all of indexing.SCHEMA.

    Raises:
        ValueError: a part is damaged, or not what the manifest says.
    """
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    tables = [_read_part(manifest, name, schema) for name in names]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def refuse_equal_names(catalogues: Iterable[Catalogue]) -> None:
    """Sample ids derive from the dataset's name: two folders of one name would share ids, and so
    random draws and exclusions. One folder may be listed several times.

    Raises:
        ValueError: two folders have one name.
    """
    roots: dict[str, Root] = {}
    for catalogue in catalogues:
        root = roots.setdefault(catalogue.dataset, catalogue.root)
        if _identity(root) != _identity(catalogue.root):
            raise ValueError(
                f"{root} and {catalogue.root} are both named {catalogue.dataset!r}, so their "
                "samples would share ids; give one another name: "
                f"`longtake index {catalogue.root} --dataset NAME`"
            )


def _identity(root: Root) -> Root:
    return root.resolve() if isinstance(root, Path) else root


def _load(manifest: CatalogueManifest) -> Catalogue:
    return Catalogue(
        root=manifest.root,
        table=read_parts(manifest, list(manifest.shards)).combine_chunks(),
        dataset=manifest.dataset,
        fingerprint=manifest.fingerprint,
        rejected=tuple(manifest.rejections()),
    )


def _parse_manifest(tree: dict[str, Any], root: Root, folder: Path) -> CatalogueManifest:
    shards = {}
    for name, entry in tree["shards"].items():
        if not name.endswith(".tar") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} is not the name of a tar in the folder")
        numbers = [entry[key] for key in ("samples", "bytes", "rejected")]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"the numbers of {name} are {numbers}")
        samples, size, rejected = numbers
        shards[name] = ShardEntry(samples, size, str(entry["digest"]), rejected)
    return CatalogueManifest(
        root=root,
        folder=folder,
        dataset=str(tree["dataset"]),
        fingerprint=str(tree["fingerprint"]),
        shards=shards,
        passed_over=dict(tree["passed_over"]),
    )


def _read_part(manifest: CatalogueManifest, name: str, schema: pa.Schema) -> pa.Table:
    entry, part = manifest.shards[name], manifest.folder / part_name(name)
    try:
        if read_facts(part)["digest"] != entry.digest:
            raise ValueError("its rows are not those of the manifest")
        file = pq.ParquetFile(part, page_checksum_verification=True)
        table = file.read(columns=schema.names, use_threads=False)
        if "variant" in schema.names and "variant" not in table.column_names:
            table = table.append_column("variant", pa.nulls(table.num_rows))  # of an older version
        table = table.select(schema.names)
        table = table.replace_schema_metadata().cast(schema)
        _check_rows(table, name, entry)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise _damaged(part, error, manifest.root) from error
    return table


def _check_rows(table: pa.Table, name: str, entry: ShardEntry) -> None:
    """Rows must lie within their tar: a read is never asked for more than a file holds."""
    if table.num_rows != entry.samples:
        raise ValueError(f"has {table.num_rows} rows, the manifest says {entry.samples}")
    columns = table.column_names
    if "shard" in columns and table.num_rows and pc.unique(table["shard"]).to_pylist() != [name]:
        raise ValueError("names other shards in its rows")
    for member in ("payload", "meta"):
        if f"{member}_offset" in columns and f"{member}_size" in columns:
            offset, size = (column(table, f"{member}_{field}") for field in ("offset", "size"))
            if (offset < 0).any() or (size < 0).any() or (size > entry.bytes - offset).any():
                raise ValueError(f"places a {member} outside the tar")


def _damaged(path: Path, error: Exception, root: Root) -> ValueError:
    return ValueError(f"{path}: damaged: {error}; run `longtake index {root} --fresh`")


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column without nulls as a NumPy array."""
    return table.column(name).to_numpy()
