"""The validation loss of a run as a matrix: noise levels across, buckets and tasks down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from longtake.train.run_folder import VALIDATION
from longtake.train.tracking import Tracker

CELL = re.compile(r"val/loss/t(?P<level>[\d.]+)/(?P<row>[\dx]+/\w+?)(?P<ema>_ema)?")
WEIGHTS = {"": "weights", "_ema": "EMA"}


def level_name(level: float) -> str:
    """`0.50`: two decimals, or as many as the level has."""
    exact = f"{Decimal(repr(level)):f}"
    return max(exact, f"{level:.2f}", key=len)


@dataclass(frozen=True)
class LossMatrix:
    """Mean loss of a noisy token by row (bucket/task) and noise level, for each of WEIGHTS."""

    rows: tuple[str, ...]
    levels: tuple[str, ...]
    values: dict[tuple[str, str, str], float]  # weights, row, level

    @property
    def table(self) -> tuple[list[str], list[list[str | float | None]]]:
        """Columns and rows of a table."""
        body = [
            [weights, row, *(self.values.get((weights, row, level)) for level in self.levels)]
            for weights in WEIGHTS.values()
            for row in self.rows
        ]
        return ["weights", "bucket/task", *(f"t={level}" for level in self.levels)], body


def matrix_of(metrics: Mapping[str, float]) -> LossMatrix | None:
    """The matrix in a row of metrics; None where they hold no cell of it."""
    found = [(match, value) for n, value in metrics.items() if (match := CELL.fullmatch(n))]
    values = {(WEIGHTS[m["ema"] or ""], m["row"], m["level"]): value for m, value in found}
    rows = tuple(sorted({row for _, row, _ in values}))
    levels = tuple(sorted({level for _, _, level in values}))
    return LossMatrix(rows, levels, values) if rows else None


def show_matrix(metrics: Mapping[str, float], folder: Path, step: int, tracker: Tracker) -> None:
    """The matrix in a row of metrics as a picture in the run folder and a table in the tracker."""
    matrix = matrix_of(metrics)
    if matrix is not None:
        path = folder / VALIDATION / f"step-{step:08d}.png"
        write_heatmap(matrix, path)
        tracker.log_videos(step, {"val/heatmap": path})
        tracker.log_table(step, "val/matrix", *matrix.table)


def write_heatmap(matrix: LossMatrix, path: Path) -> None:
    """A PNG, raw weights beside EMA. Colours are by column: losses differ by level far more than by
    anything else."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 1.3 * len(matrix.levels), 1.2 + 0.3 * len(matrix.rows)))
    FigureCanvasAgg(figure)
    for number, weights in enumerate(WEIGHTS.values(), start=1):
        axes = figure.add_subplot(1, len(WEIGHTS), number)
        losses = [
            [matrix.values.get((weights, row, level), float("nan")) for level in matrix.levels]
            for row in matrix.rows
        ]
        spans = [(min(column), max(column)) for column in zip(*losses, strict=True)]
        shades = [
            [(x - low) / (high - low or 1) for x, (low, high) in zip(line, spans, strict=True)]
            for line in losses
        ]
        axes.imshow(shades, cmap="YlOrRd", vmin=0, vmax=1.6, aspect="auto")
        for y, line in enumerate(losses):
            for x, value in enumerate(line):
                axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(matrix.levels)), [f"t={level}" for level in matrix.levels])
        axes.set_yticks(range(len(matrix.rows)), matrix.rows if number == 1 else [])
        axes.tick_params(labelsize=7, length=0)
        axes.set_title(f"validation loss, {weights}", fontsize=8, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
