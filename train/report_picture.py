"""A still picture of what a run draws: prompts, frames of the sample, frames of the truth."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FRAMES = 4  # of each clip
MAX_BYTES = 300_000  # a README should load at once
CELLS = (128, 112, 96, 80, 64, 48, 32)  # px per frame, the largest that fits counts
WRAP = 30  # characters of a prompt per line


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
    """Write a PNG below 300 kB; frames shrink until it fits. ValueError without rows."""
    if not rows:
        raise ValueError("no clip to show: run `longtake evaluate` before `longtake report`")
    scratch = path.with_name(path.name + ".tmp.png")
    for cell in CELLS:
        _draw(rows, scratch, cell)
        if scratch.stat().st_size <= MAX_BYTES:
            break
    os.replace(scratch, path)


def _draw(rows: Sequence[PictureRow], path: Path, cell: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gap, text, head = cell // 16 + 1, 2 * cell + 40, cell // 4 + 8  # px
    height = round(cell * rows[0].drawn.shape[1] / rows[0].drawn.shape[2])
    half = FRAMES * (cell + gap) + gap
    canvas = np.full((head + len(rows) * (height + gap), text + 2 * half, 3), 255, np.uint8)
    dpi = 100
    figure = Figure(figsize=(canvas.shape[1] / dpi, canvas.shape[0] / dpi), dpi=dpi)
    FigureCanvasAgg(figure)
    style: dict[str, Any] = {"va": "center", "fontsize": cell / 12 + 1}
    for index, row in enumerate(rows):
        top = head + index * (height + gap)
        for side, frames in enumerate((row.drawn, row.truth)):
            for column, frame in enumerate(chosen(frames)):
                left = text + side * half + column * (cell + gap)
                canvas[top : top + height, left : left + cell] = nearest(frame, height, cell)
        middle = 1 - (top + height / 2) / canvas.shape[0]
        lines = "\n".join(textwrap.wrap(row.prompt, WRAP)[:5])
        figure.text(gap / canvas.shape[1], middle, lines, color="#1f2430", **style)
    for side, title in enumerate(("drawn from the prompt", "a true clip with this caption")):
        place = (text + side * half) / canvas.shape[1], 1 - head / 2 / canvas.shape[0]
        figure.text(*place, title, color="#667085", **style)
    figure.figimage(canvas)
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})


def nearest(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frame (H, W, 3) at another size, without blur."""
    rows = np.arange(height) * frame.shape[0] // height
    columns = np.arange(width) * frame.shape[1] // width
    return frame[rows[:, None], columns]
