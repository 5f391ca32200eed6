"""What a run does when trouble comes: signals, spikes, and samples that are no good."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from longtake.data.plan import Exclusion

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 5.0
# Below this many samples a fraction says little: a few bad clips at the start must not stop a run.
MIN_SEEN = 200
NUM_WATCHED, MIN_WATCHED = 100, 10  # losses of which a jump is judged
NORM_DECAY, MIN_NORMS = 0.97, 25  # of the averages of gradient norms; before, they say little


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


class NormWatch:
    """Adaptive clipping: at the mean of the last gradient norms plus `sigmas` deviations.

    Mean and deviation are exponential averages, into which a norm above the limit goes as the limit
    (ZClip, arXiv 2504.02507). `fixed` is a limit that always holds; 0 stands for none in both.
    """

    def __init__(self, sigmas: float, fixed: float) -> None:
        self.sigmas, self.fixed = sigmas, fixed
        self.count = 0
        self.sums = [0.0, 0.0, 0.0]  # of weights, norms and their squares, all decayed alike

    @property
    def limit(self) -> float:
        """The norm at which the next step is clipped; 0: it is not."""
        if not self.sigmas or self.count < MIN_NORMS:
            return self.fixed
        weight, norms, squares = self.sums
        mean = norms / weight
        deviation = math.sqrt(max(squares / weight - mean**2, 0.0))
        limit = mean + self.sigmas * deviation
        return min(limit, self.fixed) if self.fixed else limit

    def add(self, norm: float) -> None:
        """Count the norm of a step that was taken."""
        seen = min(norm, self.limit) if self.count >= MIN_NORMS and self.limit else norm
        new = 1.0, seen, seen**2
        self.sums = [NORM_DECAY * old + each for old, each in zip(self.sums, new, strict=True)]
        self.count += 1


class Spikes:
    """What a run remembers of trouble with its numbers: equal on all ranks, kept in checkpoints."""

    def __init__(self, loss_jump: float, clip_sigmas: float, max_grad_norm: float) -> None:
        self.losses = LossWatch(loss_jump)
        self.norms = NormWatch(clip_sigmas, max_grad_norm)
        self.skips = 0  # steps skipped in a row
        self.rewinds = 0  # returns to a checkpoint, in the whole run

    def state(self) -> dict[str, Any]:
        return {
            "losses": self.losses.recent,
            "norms": [self.norms.count, *self.norms.sums],
            "skips": self.skips,
            "rewinds": self.rewinds,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a `state()`; returns to a checkpoint since then still count."""
        self.losses.recent = list(state["losses"])
        self.norms.count, *self.norms.sums = state["norms"]
        self.skips = state["skips"]
        self.rewinds = max(self.rewinds, state["rewinds"])


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
        self._since: dict[int, int] = {}  # sample_id -> first step without it

    def agree(self, found: Sequence[Sequence[Exclusion]]) -> list[Exclusion]:
        """Add what the ranks `found` this step (in rank order) and return what is new."""
        new: dict[int, Exclusion] = {}
        for exclusion in (e for rank in found for e in rank):
            if self._is_news(exclusion):
                new.setdefault(exclusion.sample_id, exclusion)
        ordered = sorted(new.values(), key=lambda e: (e.from_step, e.sample_id))
        self._extend(ordered)
        if ordered and self.path is not None:
            self._append(self.path, ordered)
        return ordered

    def _is_news(self, exclusion: Exclusion) -> bool:
        """Whether the sample was not left out at that step already."""
        return exclusion.from_step < self._since.get(exclusion.sample_id, math.inf)

    def _extend(self, exclusions: Sequence[Exclusion]) -> None:
        self.exclusions.extend(exclusions)
        self._since |= {exclusion.sample_id: exclusion.from_step for exclusion in exclusions}

    @property
    def num_samples(self) -> int:
        """How many samples are left out."""
        return len(self._since)

    def check(self, samples_seen: int) -> None:
        """ValueError listing the bad samples once they exceed `data.max_bad_fraction`."""
        looked_at = min(max(samples_seen, MIN_SEEN), self.num_rows)
        if self.num_samples <= self.max_bad_fraction * looked_at:
            return
        listed = "\n".join(f"  {e.sample_id}: {e.reason}" for e in self.exclusions[-20:])
        raise ValueError(
            f"data.max_bad_fraction={self.max_bad_fraction}: {self.num_samples} of about "
            f"{looked_at} samples could not be used; repair or filter them, or raise the limit. "
            f"quarantine.jsonl lists all, the last are:\n{listed}"
        )

    def state(self) -> list[dict[str, int | str]]:
        return [asdict(exclusion) for exclusion in self.exclusions]

    def load(self, state: Sequence[dict[str, int | str]]) -> None:
        """Take over rows of `state()` and `read_rows()`; what says nothing new is dropped."""
        self.exclusions, self._since = [], {}
        for row in state:
            number, step, reason = int(row["sample_id"]), int(row["from_step"]), str(row["reason"])
            exclusion = Exclusion(number, step, reason)
            if self._is_news(exclusion):
                self._extend([exclusion])

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
