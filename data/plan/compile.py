"""From catalogues to the tables that plans work on: in memory, or once per node into its cache."""

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from longtake.data.catalogue import (
    Catalogue,
    CatalogueManifest,
    column,
    open_manifest,
    read_parts,
    refuse_equal_names,
)
from longtake.data.catalogue.filters import apply_filter
from longtake.data.config import DataConfig, DatasetConfig
from longtake.data.plan.buckets import assign_buckets, caption_kinds
from longtake.data.plan.costs import samples_a_step
from longtake.data.plan.lanes import count_pieces, cut_pieces
from longtake.data.plan.tables import ROW, SampleTable, TableInfo
from longtake.data.samples import LATENT_EXTENSION
from longtake.data.shards.node_cache import cache_folder

_FORMAT = 4
_ROWS_AT_ONCE = 250_000  # bounds what compiling holds in memory
_COPIED = (
    *("sample_id", "payload_offset", "payload_size", "meta_offset", "meta_size"),
    *("duration", "fps", "frames", "width", "height"),
)
_COLUMNS = (
    *_COPIED,
    *("shard", "xxh3", "meta_xxh3", "ext", "meta_ext", "key", "texts", "caption_chars"),
)


def open_tables(
    datasets: Sequence[DatasetConfig],
    config: DataConfig,
    *,
    must_fill: bool,
    closed: Collection[int] = (),
) -> list[SampleTable]:
    """The tables of a mixture, compiled on first use and then mapped; `config` is resolved.

    With `must_fill`, optional buckets that cannot fill one step join the `closed` ones, and their
    samples go to the next best. Processes of one node compile once: the others wait.

    Raises:
        ValueError: no or another catalogue, an invalid filter, nothing left, an unwritable cache.
    """
    manifests = [open_manifest(d.path, d.catalogue, config.cache) for d in datasets]
    refuse_equal_names(manifests)
    key = _plan_key(manifests, datasets, config, must_fill, closed)
    folder = cache_folder(config.cache) / "plans" / key
    places = [folder / str(index) for index in range(len(datasets))]
    try:
        if not all(map(SampleTable.is_whole, places)):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not all(map(SampleTable.is_whole, places)):
                    shutil.rmtree(folder, ignore_errors=True)
                    write = partial(_write_tables, manifests, datasets, config, must_fill, closed)
                    _compile(write, folder)
    except OSError as error:
        raise ValueError(
            f"{folder}: the compiled plan cannot be written: {error.strerror or error}; "
            "give another data.cache.folder"
        ) from error
    return [SampleTable.open(place) for place in places]


def _plan_key(
    manifests: Sequence[CatalogueManifest],
    datasets: Sequence[DatasetConfig],
    config: DataConfig,
    must_fill: bool,
    closed: Collection[int],
) -> str:
    """Hash of all that compiled tables depend on."""
    state = [
        _FORMAT,
        [(str(m.root), m.dataset, m.fingerprint) for m in manifests],
        [(n, e.samples, e.bytes, e.rejected) for m in manifests for n, e in m.shards.items()],
        [(dataset.where, dataset.captions) for dataset in datasets],
        [asdict(bucket) for bucket in config.buckets],
        [asdict(length) for length in config.lengths],
        [config.fps, config.micro_batches_per_step, config.pack, must_fill, sorted(closed)],
    ]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]


def build_tables(
    catalogues: Sequence[Catalogue],
    datasets: Sequence[DatasetConfig],
    config: DataConfig,
    *,
    must_fill: bool,
    closed: Collection[int] = (),
) -> list[SampleTable]:
    """As `open_tables`, over catalogues in memory and without a cache."""
    refuse_equal_names(catalogues)
    collected = []
    for catalogue, dataset in zip(catalogues, datasets, strict=True):
        rows_file, keys_file = io.BytesIO(), io.BytesIO()
        shards = list(dict.fromkeys(catalogue.table.column("shard").to_pylist()))
        writer = _Writer(rows_file, keys_file, dataset, shards, catalogue.dataset)
        writer.add(catalogue.table)
        rows = np.frombuffer(rows_file.getvalue(), ROW)
        keys = np.frombuffer(keys_file.getvalue(), np.uint8)
        info = writer.info(catalogue, [(name, None) for name in shards], len(catalogue.rejected))
        collected.append((info, rows, keys))
    dealt = _deal([(info, rows) for info, rows, _ in collected], config, must_fill, closed)
    return [
        SampleTable(pieces.info, {"rows": rows, "keys": keys, **pieces.arrays})
        for (_, rows, keys), pieces in zip(collected, dealt, strict=True)
    ]


def _compile(write: Callable[[Path], None], folder: Path) -> None:
    """Let `write` fill the folder, which appears when it is whole."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tables(
    manifests: Sequence[CatalogueManifest],
    datasets: Sequence[DatasetConfig],
    config: DataConfig,
    must_fill: bool,
    closed: Collection[int],
    folder: Path,
) -> None:
    collected = []
    for index, (manifest, dataset) in enumerate(zip(manifests, datasets, strict=True)):
        place = folder / str(index)
        info = _collect(manifest, dataset, place)
        rows_file = place / "rows.bin"
        empty = not rows_file.stat().st_size
        rows = np.zeros(0, ROW) if empty else np.memmap(rows_file, ROW, "r").view(np.ndarray)
        collected.append((info, rows))
    for index, dealt in enumerate(_deal(collected, config, must_fill, closed)):
        place = folder / str(index)
        dealt.arrays.pop("bucket").tofile(place / "bucket.bin")
        for name, array in dealt.arrays.items():
            np.save(place / f"{name}.npy", array)
        sizes = {}
        for path in place.iterdir():
            with open(path, "rb") as file:  # a power cut would leave files without content
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        text = json.dumps(asdict(dealt.info) | {"sizes": sizes})
        (place / "info.json").write_text(text, encoding="utf-8")


def _collect(manifest: CatalogueManifest, dataset: DatasetConfig, folder: Path) -> TableInfo:
    """Write the records and keys of one dataset."""
    folder.mkdir(parents=True)
    # A filter may ask for any column; nothing else needs more than these.
    columns = None if dataset.where.strip() else _COLUMNS
    with open(folder / "rows.bin", "wb") as rows, open(folder / "keys.bin", "wb") as keys:
        writer = _Writer(rows, keys, dataset, list(manifest.shards), manifest.dataset)
        for names in _groups(manifest):
            writer.add(read_parts(manifest, names, columns))
    shards = [(name, entry.bytes) for name, entry in manifest.shards.items()]
    return writer.info(manifest, shards, manifest.num_rejected)


@dataclass(frozen=True)
class _Dealt:
    info: TableInfo
    arrays: dict[str, np.ndarray]  # bucket, bounds, counts


def _deal(
    collected: Sequence[tuple[TableInfo, np.ndarray]],
    config: DataConfig,
    must_fill: bool,
    closed: Collection[int],
) -> list[_Dealt]:
    """Buckets and pieces of each dataset; ValueError when one has nothing that fits."""
    closed = set(closed)
    while True:
        dealt = [_deal_one(info, rows, config, closed) for info, rows in collected]
        counts = sum(piece.arrays["counts"].sum(0) for piece in dealt)
        empty = [
            index
            for index, bucket in enumerate(config.buckets)
            if bucket.optional
            and index not in closed
            and counts[index] < samples_a_step(bucket, config)
        ]
        if not (empty and must_fill):
            break
        # The emptier half only: its samples may fill the others.
        empty.sort(key=lambda index: (counts[index], index))
        closed.update(empty[: -(-len(empty) // 2)])
    for (info, rows), piece in zip(collected, dealt, strict=True):
        if not piece.arrays["counts"].any():
            seen = len(rows) + sum(info.dropped.values())
            shapes = ", ".join(bucket.name for bucket in config.buckets)
            reasons = {reason: count for reason, count in piece.info.dropped.items() if count}
            raise ValueError(
                f"dataset {info.dataset!r} ({info.root}): no sample of {seen} fits "
                f"data.buckets={shapes}: {reasons}"
            )
    return dealt


def _deal_one(
    info: TableInfo, rows: np.ndarray, config: DataConfig, closed: Collection[int]
) -> _Dealt:
    bucket = np.empty(len(rows), np.int16)
    reasons: Counter[str] = Counter()
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        bucket[part], why = assign_buckets(rows[part], config, closed)
        reasons += why
    sizes = np.bincount(rows["shard"], minlength=1)
    bounds = cut_pieces(sizes, config.micro_batches_per_step)
    counts = count_pieces(bounds, bucket, len(config.buckets))
    dropped = {**info.dropped, **dict(sorted(reasons.items()))}
    return _Dealt(
        replace(info, dropped=dropped), {"bucket": bucket, "bounds": bounds, "counts": counts}
    )


def _groups(manifest: CatalogueManifest) -> Iterator[list[str]]:
    """Shards in order, in groups of about _ROWS_AT_ONCE rows."""
    ends = accumulate(entry.samples for entry in manifest.shards.values())
    group: list[str] = []
    number = 0
    for name, end in zip(manifest.shards, ends, strict=True):
        if group and end // _ROWS_AT_ONCE > number:
            yield group
            group, number = [], end // _ROWS_AT_ONCE
        group.append(name)
    yield group


class _Writer:
    """Appends the filtered rows of catalogue tables to two files, and counts what was dropped."""

    def __init__(
        self,
        rows: BinaryIO,
        keys: BinaryIO,
        dataset: DatasetConfig,
        shards: Sequence[str],
        name: str,
    ) -> None:
        self._rows, self._keys, self._dataset = rows, keys, dataset
        self._shards = pa.array(shards, pa.string())
        self._name = name
        self._key_bytes = 0
        self._extensions: list[str] = []
        self._dropped: dict[str, int] = {}

    def add(self, table: pa.Table) -> None:
        """Filter the rows and write those that have a wanted caption."""
        where = self._dataset.where
        if where.strip():
            name = f"dataset {self._name!r}"
            table, dropped = apply_filter(table, where, name, allow_empty=True)
            for clause, count in dropped.items():
                self._drop(f"where {clause}", count)
        if not len(table):
            return
        shares = dict(sorted(self._dataset.captions.items()))
        wanted = sum((share > 0) << bit for bit, share in enumerate(shares.values()))
        kinds = caption_kinds(table, list(shares)) & np.uint16(wanted)
        kept = np.flatnonzero(kinds)
        asked = ", ".join(kind for kind, share in shares.items() if share > 0)
        self._drop(f"no caption of kind {asked}", len(table) - len(kept))
        if len(kept):
            rows = self._records(table.take(pa.array(kept)).combine_chunks())
            rows["kinds"] = kinds[kept]
            self._rows.write(rows.tobytes())

    def info(
        self,
        source: Catalogue | CatalogueManifest,
        shards: list[tuple[str, int | None]],
        rejected: int,
    ) -> TableInfo:
        """What was written, before buckets are dealt."""
        identity = f"{source.fingerprint}|{self._dataset.where}"
        return TableInfo(
            root=str(source.root),
            dataset=source.dataset,
            fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
            shards=shards,
            extensions=self._extensions,
            dropped=self._dropped,
            rejected=rejected,
        )

    def _drop(self, reason: str, count: int) -> None:
        self._dropped[reason] = self._dropped.get(reason, 0) + count

    def _records(self, table: pa.Table) -> np.ndarray:
        rows = np.zeros(len(table), ROW)
        for name in _COPIED:
            rows[name] = column(table, name)
        rows["shard"] = pc.index_in(table["shard"], self._shards).to_numpy()
        for name in ("xxh3", "meta_xxh3"):
            digests = bytes.fromhex("".join(table[name].to_pylist()))
            rows[name] = np.frombuffer(digests, "V16")
        for name in ("ext", "meta_ext"):
            rows[name] = self._codes(table[name])
        rows["latent"] = pc.equal(table["ext"], LATENT_EXTENSION).to_numpy()
        keys = [key.encode() for key in table["key"].to_pylist()]
        texts = [json.dumps(t).encode() if t else b"" for t in table["texts"].to_pylist()]
        rows["key_size"], rows["texts_size"] = (list(map(len, part)) for part in (keys, texts))
        ends = self._key_bytes + np.cumsum(rows["key_size"] + rows["texts_size"])
        rows["key_start"] = [self._key_bytes, *ends[:-1]]
        self._key_bytes = int(ends[-1])
        self._keys.write(b"".join(key + text for key, text in zip(keys, texts, strict=True)))
        return rows

    def _codes(self, column: pa.ChunkedArray) -> np.ndarray:
        found = pc.unique(column).to_pylist()
        self._extensions += [name for name in found if name not in self._extensions]
        return pc.index_in(column, pa.array(self._extensions)).to_numpy()
