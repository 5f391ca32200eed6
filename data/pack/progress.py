"""How far a pack has come, and from the first minute on how large and how late it will end."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_WAIT = 60.0  # seconds, or
_FEW = 200  # files: what a forecast is drawn from, at least


class PackProgress:
    """A bar on a terminal; elsewhere one line, once, with the forecast."""

    def __init__(
        self,
        sizes: Sequence[int],
        out: Path,
        *,
        show: bool,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sizes` in bytes of the files to come."""
        self._console = console or Console()
        self._sizes, self._out, self._show, self._clock = sizes, out, show, clock
        self._total, self._started = sum(sizes), clock()
        self._read = self._written = self._files = 0
        self._fresh = 0  # bytes read by this call, not by one that was killed
        self._is_told = False
        self._bar = Progress(
            *(
                TextColumn("pack"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
            ),
            console=self._console,
            disable=not (show and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=len(sizes))

    def __enter__(self) -> "PackProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def done(self, index: int, written: int, *, is_fresh: bool) -> None:
        """File `index` became `written` bytes, by this call or (not fresh) by an earlier one."""
        self._read += self._sizes[index]
        self._written += written
        if is_fresh:
            self._fresh += self._sizes[index]
            self._files += 1
        forecast = self.forecast()
        self._bar.update(self._task, advance=1, description=forecast or "")
        if forecast and self._show and not self._is_told and not self._console.is_terminal:
            self._console.print(f"pack: {forecast}", soft_wrap=True, highlight=False)
            self._is_told = True

    def forecast(self) -> str | None:
        """Size of the shards in the end and time left; None while it would be a guess."""
        elapsed = self._clock() - self._started
        left = self._total - self._read
        if not left or not self._fresh or (elapsed < _WAIT and self._files < _FEW):
            return None
        size = self._written / self._read * self._total
        minutes, seconds = divmod(round(elapsed * left / self._fresh), 60)
        hours, minutes = divmod(minutes, 60)
        text = f"about {decimal(round(size))} in the end, {hours}:{minutes:02}:{seconds:02} left"
        free = shutil.disk_usage(self._out.absolute().parent).free
        if size - self._written > free:
            text += f"; the disk has only {decimal(free)} free"
        return text
