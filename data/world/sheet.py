"""A picture of the families: a few frames of clips, under the caption a user would type."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longtake.data.world.clips import check_request, make_clip


def contact_sheet(
    path: Path | str,
    *,
    families: Sequence[str],
    split: str = "train",
    frames: int = 17,
    height: int = 32,
    width: int = 32,
    fps: float = 8,
    seed: int = 0,
    examples: int = 2,
    columns: int = 6,
) -> Path:
    """Write a PNG with `examples` clips of each family side by side, time from left to right.

    Raises ValueError as `make_clip` does.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_request(families, split, frames, height, width)
    columns = min(columns, frames)
    cell = 0.72 * width / min(height, width)  # inches
    row = 0.72 * height / min(height, width) + 0.34
    margin = 0.85
    figure_width = margin + examples * (columns * cell + 0.25)
    figure_height = len(families) * row + 0.1
    figure = Figure(figsize=(figure_width, figure_height), dpi=110)
    FigureCanvasAgg(figure)
    at = np.linspace(0, frames - 1, columns).round().astype(int)
    for i, family in enumerate(families):
        bottom = figure_height - (i + 1) * row
        middle = (bottom + 0.5 * (row - 0.34)) / figure_height
        figure.text(0.06 / figure_width, middle, family, fontsize=9, weight="bold", va="center")
        for j in range(examples):
            clip = make_clip(
                seed,
                split,
                j,
                families=[family],
                frames=frames,
                height=height,
                width=width,
                fps=fps,
            )
            strip = np.full((height, columns * (width + 1) - 1, 3), 255, np.uint8)
            for k, frame in enumerate(clip.frames[at]):
                strip[:, k * (width + 1) : k * (width + 1) + width] = frame
            left = margin + j * (columns * cell + 0.25)
            box = (left, bottom, columns * cell, row - 0.34)
            scale = (figure_width, figure_height) * 2
            axes = figure.add_axes(tuple(v / s for v, s in zip(box, scale, strict=True)))
            axes.imshow(strip, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            axes.set_title(clip.captions["short"], fontsize=8, loc="left", pad=3)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
