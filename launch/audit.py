"""Looking at data without training on it: is it intact, what does it hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longtake.data.catalogue import Catalogue, load_catalogue
from longtake.data.indexing import content_hash
from longtake.data.shards import ShardError, ShardReader, Span, scan_shard

GROUPS = (("split",), ("family",), ("frames", "height", "width", "fps"), ("codec",), ("licence",))
NUMBERS = ("frames", "fps", "duration", "width", "height", "keyframe_interval", "payload_size")
MAX_GROUPS = 12  # lines per table; the rest is summed up


def open_catalogue(shards: Path, catalogue: Path | None, where: str) -> Catalogue:
    """The catalogue of a folder, filtered."""
    return load_catalogue(shards, catalogue).filter(where).catalogue


def verify_shards(shards: Path, catalogue: Path | None = None, where: str = "") -> list[str]:
    """One line per damage: tars that do not scan, members whose bytes differ from the catalogue."""
    known = open_catalogue(shards, catalogue, where)
    problems: list[str] = []
    table = known.table
    for name in track(sorted(set(table["shard"].to_pylist())), description="verify"):
        path = shards / name
        rows = table.filter(pc.equal(table["shard"], name)).to_pylist()
        try:
            scan_shard(path)
        except ShardError as error:
            problems.append(str(error))
        problems += _verify_rows(path, rows)
    return problems


def _verify_rows(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    problems, reader = [], ShardReader()
    try:
        for row in rows:
            for member, digest in (("payload", row["xxh3"]), ("meta", row["meta_xxh3"])):
                span = Span(row[f"{member}_offset"], row[f"{member}_size"])
                if content_hash(reader.read(path, span)) != digest:
                    ext = row["ext" if member == "payload" else "meta_ext"]
                    problems.append(
                        f"{path}: {row['key']}.{ext} differs from the catalogue: "
                        "copy the shard again, or index it anew if the change was meant"
                    )
    except ShardError as error:
        problems.append(str(error))
    finally:
        reader.close()
    return problems


def print_stats(
    shards: Path, catalogue: Path | None = None, where: str = "", console: Console | None = None
) -> None:
    """Counts by split, family, shape, codec and licence, and the range of every number."""
    console = console or Console()
    known = open_catalogue(shards, catalogue, where)
    table = known.table
    hours = (pc.sum(table["duration"]).as_py() or 0.0) / 3600
    size = (pc.sum(table["payload_size"]).as_py() or 0) / 1e6
    shown = len(set(table["shard"].to_pylist()))
    console.print(
        f"[bold]{known.dataset}[/]: {len(known)} samples in {shown} shards, {hours:.2f} h, "
        f"{size:.1f} MB, {len(known.rejected)} rejected"
    )
    for entry in known.rejected[:MAX_GROUPS]:
        console.print(
            f"  rejected {entry['shard']} {entry['key']}: {entry['reason']}", markup=False
        )
    for columns in GROUPS:
        if any(table[name].null_count < len(table) for name in columns):
            console.print(_group_table(table, columns))
    console.print(_number_table(table))


def _group_table(table: pa.Table, columns: tuple[str, ...]) -> Table:
    counted = table.group_by(list(columns)).aggregate([([], "count_all")])
    rows = sorted(counted.to_pylist(), key=lambda row: -row["count_all"])
    out = Table(*(name for name in columns), "samples", "share")
    for row in rows[:MAX_GROUPS]:
        count = row["count_all"]
        cells = ("–" if row[name] is None else f"{row[name]}" for name in columns)
        out.add_row(*cells, str(count), f"{count / len(table):.1%}")
    if rest := rows[MAX_GROUPS:]:
        count = sum(row["count_all"] for row in rest)
        blanks = ("",) * (len(columns) - 1)
        out.add_row(f"{len(rest)} more", *blanks, str(count), f"{count / len(table):.1%}")
    return out


def _number_table(table: pa.Table) -> Table:
    out = Table("column", "min", "median", "mean", "max")
    for name in NUMBERS:
        values = table[name]
        low, high = pc.min_max(values).as_py().values()
        middle = pc.quantile(values, q=0.5)[0].as_py()
        cells = (low, middle, pc.mean(values).as_py(), high)
        out.add_row(name, *("–" if cell is None else f"{cell:.6g}" for cell in cells))
    return out
