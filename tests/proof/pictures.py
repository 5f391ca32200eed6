"""Pictures of a proof for the documents: curves, and clips beside what a VAE makes of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from longtake.train.playback import read_footage_file
from longtake.train.report_curves import Series

T = TypeVar("T")
MAX_BYTES = 1_000_000
ROWS, FRAMES, SHRINK = 3, 3, 2
SAMPLE_FRAMES = 6


def draw_curves(parts: Mapping[str, Series], path: Path, what: str) -> None:
    """Values over optimizer steps, a panel for each part of a training; `what` they are."""
    figure = Figure(figsize=(3.2 * len(parts), 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, len(parts), sharey=True))
    for axes, (title, series) in zip(panels, parts.items(), strict=True):
        axes.plot(series.steps, series.values, marker="o", markersize=3)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.grid(alpha=0.3)
    figure.supylabel(what, fontsize=8)
    save(figure, path)


def draw_reconstructions(samples: Path, path: Path) -> None:
    """First, middle and last frame of a few clips drawn last: original, reconstruction, difference.

    `samples` is that folder of a run. ValueError when it holds no drawing, or the picture is large.
    """
    folders = sorted(samples.glob("step-*"))
    if not folders:
        raise ValueError(f"{samples}: holds no drawing; train with train.sample_every > 0")
    rows = []
    for file in spread(sorted(folders[-1].glob("*.mp4")), ROWS):
        frames = list(read_footage_file(file).frames)  # each (H, 3W, 3)
        rows.append(np.concatenate([framed(frame) for frame in spread(frames, FRAMES)], axis=1))
    picture = np.concatenate(rows)
    height, width = picture.shape[:2]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    FigureCanvasAgg(figure)
    figure.figimage(picture)
    save(figure, path)


def draw_samples(evaluation: Path, path: Path) -> None:
    """Clips that `longtake evaluate` kept of t2v: frames drawn under their prompt, and beside them
    those of the truth, through the VAE and as it is."""
    table = pq.read_table(evaluation / "clips.parquet", columns=["prompt", "task", "files"])
    kept = [row for row in table.to_pylist() if row["files"] and row["task"] == "t2v"]
    columns = max(len(row["files"]) for row in kept)
    figure = Figure(figsize=(4.5 * columns, 0.85 * len(kept)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(kept), columns, squeeze=False)
    for row, shown in zip(kept, panels, strict=True):
        for axes, (which, file) in zip(shown, row["files"], strict=True):
            frames = spread(list(read_footage_file(evaluation / file).frames), SAMPLE_FRAMES)
            apart = [np.pad(f, ((0, 0), (0, 2), (0, 0)), constant_values=255) for f in frames]
            axes.imshow(np.concatenate(apart, axis=1), interpolation="nearest")
            title = {"drawn": row["prompt"], "VAE": "truth, through the VAE"}.get(which, which)
            axes.set_title(title, fontsize=8)
            axes.axis("off")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a picture; ValueError when it is large."""
    figure.savefig(path, dpi=100)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, at most {MAX_BYTES}")


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items at even distances, the first and the last among them."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def framed(frame: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) at half its size with a white rim."""
    return np.pad(frame[::SHRINK, ::SHRINK], ((3, 3), (3, 3), (0, 0)), constant_values=255)
