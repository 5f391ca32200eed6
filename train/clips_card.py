"""The card of an evaluation on clips without truth: means, what they compare with, and what is
missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from longtake.train.run_folder import write_json

SCHEMA = 1
# Columns of clips.parquet and what they hold, for people: NAME for what was drawn, and NAME with an
# ending for what that is read against (see Measure), where it makes sense.
ENDINGS = ("", "_truth", "_held", "_codec")
MEASURES = {
    "loss": "validation loss",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "flicker": "flicker, grey levels",
    "clip_score": "CLIP score",
    "distance": "nearest training clip, RMS",
}
OF_SETS = {"fvd": "FVD", "memorised": "near training, share"}  # not a mean over clips
MEMORISED_PERCENT = 1  # of the true clips lie so near to the training set by chance


@dataclass(frozen=True)
class Measure:
    """A figure of what was drawn, beside the figures it is to be read against."""

    name: str
    drawn: float
    truth: float | None = None  # the true clips
    held: float | None = None  # the last given frame, held: knows nothing of motion
    codec: float | None = None  # the true clips through the codec: the best that can be drawn


@dataclass(frozen=True)
class TaskScores:
    """What was measured of one task."""

    task: str
    num_clips: int
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class ClipsCard:
    """`left_out` are lines on clips that were not drawn, `not_measured` on absent measures."""

    about: dict[str, Any]
    tasks: tuple[TaskScores, ...]
    left_out: tuple[str, ...]
    not_measured: tuple[str, ...]


def score_task(
    task: str, rows: Sequence[Mapping[str, Any]], further: Sequence[Measure] = ()
) -> TaskScores:
    """Means over the rows of a task's clips that have the measure, then what is no mean of rows."""
    measures = []
    for name in MEASURES:
        drawn = _mean(rows, name)
        if drawn is not None:
            measures.append(Measure(name, drawn, *(_mean(rows, name + e) for e in ENDINGS[1:])))
    return TaskScores(task, len(rows), (*measures, *further))


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return fmean(values) if values else None


def write_clips_card(card: ClipsCard, path: Path) -> None:
    """Write clips_card.json atomically, its measures by task and name."""
    tasks: dict[str, dict[str, Any]] = {}
    for scores in card.tasks:
        tasks[scores.task] = {"clips": scores.num_clips}
        for measure in scores.measures:
            figures = {k: v for k, v in asdict(measure).items() if v is not None}
            tasks[scores.task][figures.pop("name")] = figures
    tree = {
        "schema": SCHEMA,
        "kind": "clips",
        "tasks": tasks,
        "left_out": card.left_out,
        "not_measured": card.not_measured,
        "about": card.about,
    }
    write_json(path, tree, allow_nan=False)


def print_clips_card(card: ClipsCard, console: Console | None = None) -> None:
    """The table a person reads, and every gap in it."""
    console = console or Console()
    title = f"{card.about['run']} · {card.about['shards']}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("task", "measure"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "drawn", "true clips", "held", "codec"):
        table.add_column(name, justify="right", no_wrap=True)
    for scores in card.tasks:
        for index, measure in enumerate(scores.measures):
            table.add_row(
                "" if index else scores.task,
                {**MEASURES, **OF_SETS}[measure.name],
                "" if index else str(scores.num_clips),
                f"[bold]{_figure(measure.drawn)}",
                *(_figure(value) for value in (measure.truth, measure.held, measure.codec)),
            )
    console.print(table)
    for line in (
        "held: the last given frame stands still; codec: the true clips encoded and decoded",
        f"near training: nearer to training clips than all but {MEMORISED_PERCENT} % of true clips",
        *(f"left out: {line}" for line in card.left_out),
        *(f"not measured: {line}" for line in card.not_measured),
    ):
        console.print(line, style="dim", soft_wrap=True, markup=False)


def _figure(value: float | None) -> str:
    """Three or more significant digits."""
    if value is None:
        return "–"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:.{min(max(digits, 0), 4)}f}"
