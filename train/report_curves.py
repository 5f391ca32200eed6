"""Curves of a run as inline SVG, from metrics.jsonl."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longtake.train.tracking import read_metrics

INK, GRID, FIRST, SECOND = "#1f2430", "#d9dde5", "#2563c9", "#12805c"
MANY = 40  # points; more are smoothed


@dataclass(frozen=True)
class Series:
    """One metric over optimizer steps, steps ascending."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_series(run: Path) -> dict[str, Series]:
    """The numeric metrics of a run folder by name; ValueError where nothing was logged."""
    rows = read_metrics(run / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{run}/metrics.jsonl has no rows; give the folder of a run that trained")
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "attempt") and isinstance(value, int | float):
                points.setdefault(name, {})[int(row["step"])] = float(value)
    return {
        name: Series(name, tuple(values), tuple(values.values()))
        for name, values in sorted(points.items())
    }


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Running mean over the last `window` values: the eye needs it on losses of small batches."""
    total, out = 0.0, []
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        out.append(total / min(index + 1, window))
    return out


def svg(series: Series, ema: Series | None = None) -> str:
    """One chart as an <svg> element; thin raw values behind a running mean, EMA weights in green.

    The axis is logarithmic where positive values span more than a decade.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(3.4, 2.1))
    figure.subplots_adjust(left=0.15, right=0.97, top=0.88, bottom=0.12)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for line, colour, label in ((series, FIRST, "weights"), (ema, SECOND, "EMA")):
        if line is None:
            continue
        values = line.values
        if len(values) > MANY:
            axes.plot(line.steps, values, color=colour, alpha=0.22, linewidth=0.7)
            values = smoothed(values, len(values) // MANY)
        marker = "o" if len(values) < 12 else ""
        axes.plot(line.steps, values, color=colour, lw=1.6, marker=marker, ms=3, label=label)
    if ema is not None:
        axes.legend(fontsize=7, frameon=False)
    axes.set_title(series.name, fontsize=9, color=INK, loc="left", fontweight="bold")
    low, high = min(series.values), max(series.values)
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(labelsize=7, colors=INK, length=2)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # Ids are unique per figure only; a page holds many figures.
    tag = re.sub(r"\W", "_", series.name)
    element = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{tag}_", element)
    return element.replace("<svg ", f'<svg role="img" aria-label="{series.name}" ', 1)
