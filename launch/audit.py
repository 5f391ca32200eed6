"""Looking at data without training on it: what does a set hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from longtake.data.catalogue import CatalogueManifest, open_manifest, read_parts
from longtake.data.catalogue.filters import apply_filter
from longtake.launch.stats_plot import check_plot_path, plot_stats

GROUPS = (("split",), ("family",), ("frames", "height", "width", "fps"), ("codec",), ("licence",))
NUMBERS = ("frames", "fps", "duration", "width", "height", "aspect", "keyframe_interval")
COLUMNS = (
    *("shard", "payload_size", "caption_chars", "split", "family", "codec", "licence"),
    *("frames", "fps", "duration", "width", "height", "keyframe_interval"),
)
MAX_GROUPS = 12  # lines per table; the rest is summed up
CHUNK = 256  # shards that are filtered at a time


def print_stats(
    shards: Path | str,
    catalogue: Path | str | None = None,
    where: str = "",
    *,
    plot: Path | None = None,
    console: Console | None = None,
) -> None:
    """Counts by split, family, shape, codec and licence, the range of every number and the length
    of captions; `plot` names a PNG or HTML file for the pictures.

    Raises:
        ValueError: no catalogue, a filter that is not valid or leaves nothing, another file type.
    """
    if plot is not None:
        check_plot_path(plot)
    console = console or Console()
    manifest = open_manifest(shards, catalogue)
    table, dropped = _read(manifest, where)
    hours = (pc.sum(table["duration"]).as_py() or 0.0) / 3600
    size = (pc.sum(table["payload_size"]).as_py() or 0) / 1e6
    summary = (
        f"{table.num_rows} samples in {pc.count_distinct(table['shard']).as_py()} shards, "
        f"{hours:.2f} h, {size:.1f} MB"
    )
    console.print(f"[bold]{manifest.dataset}[/]: {summary}")
    for clause, count in dropped.items():
        console.print(f"  {clause!r} drops {count}", markup=False)
    for line in manifest.remarks(MAX_GROUPS):
        console.print(line, markup=False)
    for columns in GROUPS:
        if any(table[name].null_count < len(table) for name in columns):
            console.print(_group_table(table, columns))
    lengths = caption_lengths(table)
    numbers = {name: table[name].to_numpy() for name in NUMBERS}
    numbers["megabytes"] = table["payload_size"].to_numpy() / 1e6
    numbers |= {f"caption {kind!r}, characters": values for kind, values in lengths.items()}
    console.print(_number_table(numbers))
    if plot is not None:
        plot_stats(plot, table, lengths, title=f"{manifest.dataset}: {summary}")
        console.print(f"drawn in {plot}", markup=False)


def caption_lengths(table: pa.Table) -> dict[str, np.ndarray]:
    """Characters of the captions of each kind, most frequent kinds first."""
    captions = table["caption_chars"].combine_chunks()
    kinds, chars = captions.keys, captions.items
    counted = sorted(pc.value_counts(kinds).to_pylist(), key=lambda entry: -entry["counts"])
    names = [entry["values"] for entry in counted[:MAX_GROUPS]]
    return {name: chars.filter(pc.equal(kinds, name)).to_numpy() for name in names}


def _read(manifest: CatalogueManifest, where: str) -> tuple[pa.Table, dict[str, int]]:
    """The filtered rows with an aspect column, and the rows that each clause drops."""
    names, tables = list(manifest.shards), []
    dropped: Counter[str] = Counter()
    for first in range(0, len(names), CHUNK):
        some = names[first : first + CHUNK]
        table = read_parts(manifest, some, None if where else COLUMNS)
        if where:
            table, drops = apply_filter(table, where, manifest.dataset, allow_empty=True)
            dropped.update(drops)
        tables.append(table.select(COLUMNS))
    table = pa.concat_tables(tables)
    if not table.num_rows:
        drops = ", ".join(f"{clause!r} drops {count}" for clause, count in dropped.items())
        raise ValueError(f"{manifest.root}: where={where!r} leaves no sample: {drops}")
    aspect = pc.divide(pc.cast(table["width"], pa.float32()), table["height"])
    return table.append_column("aspect", aspect), dict(dropped)


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


def _number_table(numbers: dict[str, np.ndarray]) -> Table:
    out = Table("column", "min", "median", "mean", "max")
    for name, values in numbers.items():
        cells = (values.min(), np.median(values), values.mean(dtype=float), values.max())
        out.add_row(name, *(f"{cell:.6g}" for cell in cells))
    return out
