"""What a run does when trouble comes from outside: signals, and samples that are no good."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from longtake.data.plan import Exclusion

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 5.0
# Below this many samples a fraction says little: a few bad clips at the start must not stop a run.
MIN_SEEN = 200
NUM_WATCHED, MIN_WATCHED = 100, 10  # losses of which a jump is judged


class StopSignal:
    """Remembers that the run was asked to stop; asked again later, it aborts with exit code 1.

    A scheduler signals all processes and torchrun hands its own on: what comes within ECHO_SECONDS
    of the first is the same request.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > ECHO_SECONDS:
            os._exit(1)

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class LossWatch:
    """Knows a jump: a step's loss above `factor` times the median of the last steps' (0: never)."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.recent: list[float] = []

    def jumped(self, loss: float) -> bool:
        """Whether this step's loss is a jump; one that is not joins the recent ones."""
        if len(self.recent) >= MIN_WATCHED and loss > self.factor * statistics.median(self.recent):
            return True
        self.recent = [*self.recent, loss][-NUM_WATCHED:]
        return False

    def is_high(self, loss: float) -> bool:
        """The same of a part of a step."""
        return loss > self.factor * statistics.median(self.recent)


class Quarantine:
    """The append-only list of excluded samples, equal on all ranks.

    `agree` makes it durable in quarantine.jsonl before the optimizer steps; the checkpoint carries
    it too. A resumed run takes both: a sample left out once is left out again at the same step,
    though it may be readable by then.
    """

    def __init__(self, path: Path | None, max_bad_fraction: float, num_rows: int) -> None:
        """`path` is None on ranks that do not write; `num_rows` counts the training catalogues."""
        self.path = path
        self.max_bad_fraction = max_bad_fraction
        self.num_rows = num_rows
        self.exclusions: list[Exclusion] = []

    def agree(self, found: Sequence[Sequence[Exclusion]]) -> list[Exclusion]:
        """Add what the ranks `found` this step (in rank order) and return what is new."""
        known = {exclusion.sample_id for exclusion in self.exclusions}
        new: dict[int, Exclusion] = {}
        for exclusion in (e for rank in found for e in rank):
            if exclusion.sample_id not in known:
                new.setdefault(exclusion.sample_id, exclusion)
        ordered = sorted(new.values(), key=lambda e: (e.from_step, e.sample_id))
        self.exclusions.extend(ordered)
        if ordered and self.path is not None:
            self._append(self.path, ordered)
        return ordered

    def check(self, samples_seen: int) -> None:
        """ValueError listing the bad samples once they exceed `data.max_bad_fraction`."""
        looked_at = min(max(samples_seen, MIN_SEEN), self.num_rows)
        if len(self.exclusions) <= self.max_bad_fraction * looked_at:
            return
        listed = "\n".join(f"  {e.sample_id}: {e.reason}" for e in self.exclusions[-20:])
        raise ValueError(
            f"data.max_bad_fraction={self.max_bad_fraction}: {len(self.exclusions)} of about "
            f"{looked_at} samples could not be used; repair or filter them, or raise the limit. "
            f"quarantine.jsonl lists all, the last are:\n{listed}"
        )

    def state(self) -> list[dict[str, int | str]]:
        return [asdict(exclusion) for exclusion in self.exclusions]

    def load(self, state: Sequence[dict[str, int | str]]) -> None:
        """Take over rows of `state()` and `read_rows()`; of a sample named twice the first."""
        first: dict[int, Exclusion] = {}
        for row in state:
            number, step, reason = int(row["sample_id"]), int(row["from_step"]), str(row["reason"])
            first.setdefault(number, Exclusion(number, step, reason))
        self.exclusions = list(first.values())

    @staticmethod
    def read_rows(path: Path, *, repair: bool = True) -> list[dict[str, int | str]]:
        """The rows of quarantine.jsonl; a last one cut by a kill was never acted on, and goes with
        `repair`. Whoever only looks must not: the run may just be writing it."""
        if not path.is_file():
            return []
        *lines, torn = path.read_text(encoding="utf-8").split("\n")
        if torn and repair:
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return [json.loads(line) for line in lines]

    @staticmethod
    def _append(path: Path, exclusions: Sequence[Exclusion]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(e)) + "\n" for e in exclusions)
            file.flush()
            os.fsync(file.fileno())
