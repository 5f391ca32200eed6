"""The pictures of `longtake stats --plot`: one figure, as PNG or inside an HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS, MAX_NAME = 10, 28
BINS = 40
_BLUE, _GREY, _NONE = "#3b6fb6", "#b9bfc8", "none"


def check_plot_path(path: Path) -> None:
    """Raises:
    ValueError: neither PNG nor HTML, or its folder is missing.
    """
    if path.suffix.lower() not in (".png", ".html"):
        raise ValueError(f"--plot {path}: must end in .png or .html")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: no folder {path.parent}")


def plot_stats(path: Path, table: pa.Table, captions: dict[str, np.ndarray], title: str) -> None:
    """Draw durations, sizes, rates, codecs, keyframe spacing, aspect ratios, captions, licences,
    splits and families of catalogue rows; `captions` holds characters by kind."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(13, 10), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = iter(figure.subplots(4, 3).flat)
    for name, label in (
        ("duration", "duration, s (images: 0)"),
        ("frames", "frames"),
        ("keyframe_interval", "keyframe spacing, s (images: 0)"),
        ("aspect", "aspect ratio, width / height"),
    ):
        _histogram(next(panels), {"": table[name].to_numpy()}, label)
    _histogram(next(panels), {"": table["payload_size"].to_numpy() / 1e6}, "clip, MB")
    _histogram(next(panels), captions, "caption length, characters")
    for columns, label in (
        (("width", "height"), "size, pixels"),
        (("fps",), "frames per second (images: 0)"),
        (("codec",), "codec"),
        (("licence",), "licence"),
        (("split",), "split"),
        (("family",), "family"),
    ):
        _bars(next(panels), table, columns, label)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    if path.suffix.lower() == ".png":
        path.write_bytes(buffer.getvalue())
        return
    image = base64.b64encode(buffer.getvalue()).decode()
    name = html.escape(title)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f'<body><img style="max-width:100%" alt="{name}" src="data:image/png;base64,{image}">'
        "</body></html>\n",
        encoding="utf-8",
    )


def _histogram(axes: Axes, series: Mapping[str, np.ndarray], label: str) -> None:
    """Samples over a number, on a logarithmic scale where it spans more than two decades."""
    values = np.concatenate(list(series.values()))
    low, high = float(values.min()), float(values.max())
    bins: Sequence[float] = np.linspace(low, high, BINS + 1).tolist()
    if low > 0 and high > 100 * low:
        bins = np.geomspace(low, high, BINS + 1).tolist()
        axes.set_xscale("log")
    if high - low < 1e-6 * max(abs(high), 1.0):  # a single value: a bar of some width around it
        bins = np.linspace(low - 0.5, high + 0.5, BINS + 2).tolist()
    for name, part in series.items():
        if len(series) == 1:
            axes.hist(part, bins, color=_BLUE)
        else:
            axes.hist(part, bins, histtype="step", linewidth=1.5, label=name)
    if len(series) > 1:
        axes.legend(fontsize=8)
    axes.set_xlabel(label)
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Axes, table: pa.Table, columns: Sequence[str], label: str) -> None:
    """Samples of the most frequent values, the rest in one bar."""
    counted = table.group_by(list(columns)).aggregate([([], "count_all")]).to_pylist()
    counted.sort(key=lambda row: -row["count_all"])
    names = ["x".join(_shown(row[column]) for column in columns) for row in counted[:MAX_BARS]]
    counts = [row["count_all"] for row in counted[:MAX_BARS]]
    if rest := counted[MAX_BARS:]:
        names.append(f"{len(rest)} more")
        counts.append(sum(row["count_all"] for row in rest))
    places = range(len(names))
    colours = [_GREY if name == _NONE or name.endswith(" more") else _BLUE for name in names]
    axes.barh(places, counts, color=colours)
    axes.set_yticks(places, [name[:MAX_NAME] for name in names], fontsize=8)
    axes.set_ylim(max(len(names), 4) - 0.4, -0.6)  # the most frequent on top, no giant single bar
    axes.set_xlabel(f"samples by {label}")
    axes.spines[["top", "right"]].set_visible(False)


def _shown(value: str | float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("$", r"\$")
