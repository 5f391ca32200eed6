"""A still picture of what a run draws: prompts, frames of the sample, frames of the truth."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FRAMES = 4  # of each clip
MAX_BYTES = 300_000  # a README should load at once
GAP = 0.12  # inches between pictures


@dataclass(frozen=True)
class PictureRow:
    """A prompt with frames uint8 (T, H, W, 3) of the drawn and of the true clip."""

    prompt: str
    drawn: np.ndarray
    truth: np.ndarray


def chosen(frames: np.ndarray, count: int = FRAMES) -> np.ndarray:
    """`count` frames at equal distances, the first and the last among them."""
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def write_picture(rows: Sequence[PictureRow], path: Path) -> None:
    """Write a PNG below 300 kB; resolution falls until it fits. ValueError without rows."""
    if not rows:
        raise ValueError("no clip to show: run `longtake evaluate` before `longtake report`")
    scratch = path.with_name(path.name + ".tmp.png")
    for dpi in (160, 130, 100, 80, 60, 45):
        _draw(rows, scratch, dpi)
        if scratch.stat().st_size <= MAX_BYTES:
            break
    os.replace(scratch, path)


def _draw(rows: Sequence[PictureRow], path: Path, dpi: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side, text, head = 0.82, 2.5, 0.34  # inches
    aspect = rows[0].drawn.shape[1] / rows[0].drawn.shape[2]
    height = side * aspect
    columns = 2 * FRAMES
    width = text + columns * side + 3 * GAP
    total = head + len(rows) * (height + GAP)
    figure = Figure(figsize=(width, total), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    for index, title in enumerate(("drawn from the prompt", "true clip with this caption")):
        left = text + index * (FRAMES * side + GAP)
        figure.text(
            *((left + 0.02) / width, 1 - 0.22 / total),
            title,
            fontsize=8,
            color="#667085",
            va="center",
        )
    for number, row in enumerate(rows):
        bottom = total - head - (number + 1) * (height + GAP) + GAP
        figure.text(
            *(0.08 / width, (bottom + height / 2) / total),
            "\n".join(textwrap.wrap(row.prompt, 34)[:4]),
            fontsize=8.5,
            color="#1f2430",
            va="center",
        )
        for half, frames in enumerate((row.drawn, row.truth)):
            for column, frame in enumerate(chosen(frames)):
                left = text + half * (FRAMES * side + GAP) + column * side
                axes = figure.add_axes(
                    (left / width, bottom / total, (side - 0.04) / width, height / total)
                )
                axes.imshow(frame, interpolation="nearest", aspect="auto")
                axes.set_axis_off()
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})
