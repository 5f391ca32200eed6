"""The full check of a set: its tars, its catalogue, every member's bytes and every frame.

A defect never hides another: what the catalogue lists is read by offset even where the tar's own
headers are damaged, and a tar is scanned even where its part of the catalogue is damaged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from longtake.data.catalogue import CatalogueManifest, compare_tars, read_manifest, read_parts
from longtake.data.catalogue.filters import apply_filter
from longtake.data.catalogue.index_run import part_name, read_facts
from longtake.data.catalogue.indexing import SCHEMA, content_hash, index_shard
from longtake.data.catalogue.layouts import split_dotted
from longtake.data.decode import DecodeError
from longtake.data.decode.check import decode_all
from longtake.data.process_map import map_processes, sample_bar
from longtake.data.samples import LATENT_EXTENSION, SampleError, combine_meta
from longtake.data.shards import ShardError, ShardReader, Span, scan_shard
from longtake.data.shards.storage import join, local_copy


@dataclass
class VerifyReport:
    """Number of samples looked at, and a line for each defect: shard, key and what is wrong."""

    samples: int
    defects: list[str]


def verify_shards(
    shards: Path | str,
    catalogue: Path | str | None = None,
    *,
    where: str = "",
    decodes: bool = True,
    num_workers: int = 2,
    progress: bool = True,
) -> VerifyReport:
    """Check a folder or URL of shards against its catalogue, and decode every frame.

    `where` picks the samples whose members are read; the tars are scanned whole all the same.

    Raises:
        ValueError: no folder, no catalogue, or a filter that is not valid.
    """
    manifest = read_manifest(shards, catalogue)
    if where:
        apply_filter(SCHEMA.empty_table(), where, str(shards), allow_empty=True)
    missing: set[str] = set()
    report = VerifyReport(0, [])
    if isinstance(manifest.root, Path):
        report.defects += compare_tars(manifest, manifest.root)
        missing = {name for name in manifest.shards if not (manifest.root / name).is_file()}
    names = [name for name in manifest.shards if name not in missing]
    check = partial(_check_shard, manifest, where, decodes)
    with sample_bar("verify", len(names), progress) as advance:
        for found in map_processes(check, names, num_workers):
            report.samples += found.samples
            report.defects += found.defects
            advance(found.samples)
    report.defects.sort()
    return report


def _check_shard(manifest: CatalogueManifest, where: str, decodes: bool, name: str) -> VerifyReport:
    shown = str(join(manifest.root, name))
    report = VerifyReport(0, [])
    with local_copy(manifest.root, name) as path:
        try:
            scanned = scan_shard(path)
        except ShardError as error:
            scanned = None
            report.defects.append(str(error))
        try:
            table = read_parts(manifest, [name])
            rejected = read_facts(manifest.folder / part_name(name))["rejected"]
        except ValueError as error:
            report.defects.append(str(error))
            if scanned is None:
                return report
            index = index_shard(path, manifest.dataset, name=name)
            table, rejected = pa.Table.from_pylist(index.rows, schema=SCHEMA), index.rejected
        for entry in rejected:
            report.defects.append(f"{shown}: {entry['key']}: rejected: {entry['reason']}")
        if scanned is not None:
            present = {
                key: set(members.values())
                for entry in scanned
                for key, members in split_dotted(entry.key, entry.members)
            }
            known = {entry["key"] for entry in rejected}
            report.defects += (f"{shown}: {d}" for d in _compare_keys(table, known, present))
        if where:
            table, _ = apply_filter(table, where, shown, allow_empty=True)
        reader = ShardReader()
        for row in table.to_pylist():
            report.defects += (f"{shown}: {d}" for d in _check_row(row, path, reader, decodes))
        reader.close()
        report.samples = table.num_rows
        report.defects = [line.replace(str(path), shown) for line in report.defects]
    return report


def _compare_keys(
    table: pa.Table, rejected: set[str], present: dict[str, set[Span]]
) -> Iterator[str]:
    """Samples that only the catalogue or only the tar has, and members that lie elsewhere."""
    columns = ("key", "payload_offset", "payload_size", "meta_offset", "meta_size")
    for row in table.select(columns).to_pylist():
        spans = {Span(row[f"{m}_offset"], row[f"{m}_size"]) for m in ("payload", "meta")}
        if row["key"] not in present:
            yield f"{row['key']}: is in the catalogue but not in the tar"
        elif not spans <= present[row["key"]]:
            yield f"{row['key']}: lies elsewhere in the tar than the catalogue says"
    for key in sorted(present.keys() - rejected - set(table["key"].to_pylist())):
        yield f"{key}: is in the tar but not in the catalogue"
    for key in sorted(rejected - present.keys()):
        yield f"{key}: was rejected when indexed and is gone from the tar"


def _check_row(
    row: dict[str, Any], path: Path, reader: ShardReader, decodes: bool
) -> Iterator[str]:
    meta = {"ext": row["meta_ext"], "xxh3": row["meta_xxh3"]}
    meta |= {"offset": row["meta_offset"], "size": row["meta_size"]}
    payload = {"ext": row["ext"], "xxh3": row["xxh3"]}
    payload |= {"offset": row["payload_offset"], "size": row["payload_size"]}
    texts: list[tuple[str, bytes]] = []
    for member in (meta, *(row["texts"] or []), payload):
        where = f"{row['key']}.{member['ext']}"
        try:
            data = reader.read(path, Span(member["offset"], member["size"]))
        except (ShardError, OSError) as error:
            yield f"{where}: cannot be read: {error}"
            continue
        if content_hash(data) != member["xxh3"]:
            yield f"{where}: differs from the catalogue (xxh3): copy the shard again, or index it"
        elif member is not payload:
            texts.append((member["ext"], data))
        elif decodes:
            try:
                _decode(row, data)
            except (DecodeError, SampleError) as error:
                yield f"{where}: {error}"
    if len(texts) == 1 + len(row["texts"] or []):
        yield from _check_captions(row, texts)


def _decode(row: dict[str, Any], data: bytes) -> None:
    if row["ext"] == LATENT_EXTENSION:
        from longtake.data.latents import decode_sample  # imports torch, which videos do not need

        decode_sample(data)
        return
    found = decode_all(data)
    if (found.width, found.height) != (row["width"], row["height"]):
        raise DecodeError(
            f"decodes to {found.width}x{found.height}, "
            f"the catalogue says {row['width']}x{row['height']}"
        )
    if found.frames < row["frames"]:
        raise DecodeError(f"only {found.frames} of {row['frames']} frames can be decoded")


def _check_captions(row: dict[str, Any], texts: Sequence[tuple[str, bytes]]) -> Iterator[str]:
    try:
        captions = combine_meta(texts).captions
    except SampleError as error:
        yield f"{row['key']}: {error}"
        return
    if {kind: len(text) for kind, text in captions.items()} != dict(row["caption_chars"]):
        yield f"{row['key']}: its captions are not those of the catalogue"
