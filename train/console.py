"""What a person sees of a run: a progress bar in a terminal, a line per log row elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOWN = {  # metric -> (label, format); what else is logged is in metrics.jsonl
    "loss": ("loss", ".4f"),
    "lr": ("lr", ".2e"),
    "grad_norm": ("grad", ".2f"),
    "samples_per_second": ("samples/s", ".1f"),
    "data_wait": ("data wait", ".0%"),
    "val/loss": ("val loss", ".4f"),
    "val/loss_ema": ("ema", ".4f"),
    "val/psnr": ("val PSNR", ".2f"),
    "val/psnr_ema": ("ema", ".2f"),
    "card.mean": ("card.mean", ".3f"),
}


class RunConsole:
    """Progress of rank 0; made with `is_shown=False` it stays silent."""

    def __init__(self, title: str, total: int, done: int, is_shown: bool) -> None:
        self.is_shown = is_shown
        self.total = total
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        if is_shown and self.console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(
                TextColumn(title), *columns, TextColumn("{task.fields[note]}"), console=self.console
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self.is_shown:
            self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, row: Mapping[str, float | str]) -> None:
        """A row of metrics: beside the bar, or as a line of its own where there is no terminal."""
        parts = [
            f"{label} {format(float(row[name]), form)}"
            for name, (label, form) in SHOWN.items()
            if name in row
        ]
        note = ", ".join(parts)
        if self._bar is not None and "loss" in row:
            self._bar.update(self._task, completed=step, note=note)
        else:
            self.say(f"step {step}/{self.total}: {note}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
