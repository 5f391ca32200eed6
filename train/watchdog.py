"""A watch over each rank: a step that hangs leaves all stacks in the run folder and ends the run.

The process ends with code 1, so that the launcher can start it again. Validation, drawings and
waiting for a checkpoint are not watched: they take what they take, and collectives have a time
limit of their own.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from longtake.train.ranks import Ranks
from longtake.train.run_folder import FAILED, mark
from longtake.train.schema import TrainConfig

HANGS = "hangs"
NUM_STEPS, MIN_STEPS = 100, 5  # of which the median is taken; before, train.timeout is the limit
TICK = 0.5  # seconds between looks
GRACE = 10.0  # seconds for the other ranks to write down theirs
STDERR = 2
# A thread that hangs in C code without giving up Python's lock stops this watch as well; a thread
# of faulthandler, which needs no lock, then ends the process so much later.
LOCKED = 60.0


class Watchdog:
    """Ends the process when a step takes `train.hang_factor` times the median of the last ones, but
    at least `train.hang_seconds`; the first to notice has the other ranks write down theirs too."""

    def __init__(
        self,
        folder: Path,
        attempt: int,
        ranks: Ranks,
        config: TrainConfig,
        describe: Callable[[], str],
    ) -> None:
        """`describe` says how the loader stands; it is called from another thread."""
        self.run_folder = folder
        self.folder = folder / HANGS / f"attempt-{attempt:04d}"
        self.ranks, self.config, self.describe = ranks, config, describe
        self._times: deque[float] = deque(maxlen=NUM_STEPS)
        self._step, self._since = 0, 0.0  # 0: no step is under way
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if config.hang_factor:
            self._thread.start()

    def begin(self, step: int) -> None:
        """Step number `step` begins."""
        self._step, self._since = step, time.monotonic()

    def end(self) -> None:
        """It has ended."""
        self._times.append(time.monotonic() - self._since)
        self.rest()

    def rest(self) -> None:
        """No step is under way: what follows may take its time."""
        self._since = 0.0

    def close(self) -> None:
        """End the watch."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def limit(self) -> float:
        """Seconds that a step may take."""
        if len(self._times) < MIN_STEPS:
            return self.config.timeout
        typical = statistics.median(self._times.copy())
        return max(self.config.hang_seconds, self.config.hang_factor * typical)

    def _watch(self) -> None:
        while not self._closed.wait(TICK):
            faulthandler.dump_traceback_later(self.limit + LOCKED, exit=True, file=STDERR)
            since = self._since
            lasts = time.monotonic() - since if since else 0.0
            if lasts > self.limit or self.folder.exists():
                self._abort(lasts)
        faulthandler.cancel_dump_traceback_later()

    def _abort(self, lasts: float) -> None:
        """Write down how this rank stands, let the others do so too, end the process."""
        reason = (
            f"step {self._step} has taken {lasts:.0f} s (train.hang_factor="
            f"{self.config.hang_factor:g}, limit {self.limit:.0f} s); the stacks of all ranks are "
            f"in {self.folder}"
        )
        try:
            self._write(reason)
            mark(self.run_folder, FAILED, error=reason, step=self._step)
            print(f"longtake.train (rank {self.ranks.rank}): {reason}", file=sys.stderr, flush=True)
            deadline = time.monotonic() + GRACE
            while len(self._reports()) < self.ranks.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:  # a full disk, say, must not keep a hanging run alive
            os._exit(1)

    def _write(self, reason: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.folder / f"rank-{self.ranks.rank:05d}"
        with name.with_suffix(".tmp").open("w", encoding="utf-8") as file:
            file.write(f"{reason}\n\nStacks of rank {self.ranks.rank}:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write(f"\nLoader: {self.describe()}\n")
        name.with_suffix(".tmp").rename(name.with_suffix(".txt"))

    def _reports(self) -> list[Path]:
        return list(self.folder.glob("rank-*.txt"))
