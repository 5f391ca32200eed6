"""What a log row says: mean losses of all ranks, speed, time waited for data, memory peak."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longtake.train.ranks import Ranks
from longtake.train.tasks import LossSum


class WeightedMean:
    """Loss over the steps since the last log row: sums of all ranks over the plan's weights."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, loss: LossSum) -> None:
        """One micro-batch of this rank; stays on the device, no host sync."""
        for name, value in {"loss": loss.total.detach(), **loss.parts}.items():
            self.count(name, value)

    def count(self, name: str, value: Tensor) -> None:
        """A detached sum () of its own, to be divided by the same weights."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value.double()

    def add_weight(self, weight: float) -> None:
        """The weight of one global step, the same on all ranks."""
        self._weight += weight

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """What was summed since the last read, by rank; all ranks together."""
        mine = {name: value.item() for name, value in self._sums.items()}
        return {"sums": ranks.gather(mine), "weight": self._weight}

    def load(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Go on from `state`: bit for bit at the same number of ranks, as a total at another."""
        parts = state["sums"]
        if len(parts) == ranks.world_size:
            mine = parts[ranks.rank]
        else:
            names = parts[0] if parts else ()
            mine = {n: sum(p[n] for p in parts) if ranks.is_main else 0.0 for n in names}
        options: Any = {"dtype": torch.double, "device": ranks.device}
        self._sums = {name: torch.tensor(value, **options) for name, value in mine.items()}
        self._weight = state["weight"]

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Means since the last read; all ranks together."""
        mine = {name: value.item() for name, value in self._sums.items()}
        every = ranks.gather(mine)
        row = {name: sum(other[name] for other in every) / self._weight for name in mine}
        self._sums, self._weight = {}, 0.0
        return row


class Throughput:
    """Counts what the whole job processed between two log rows; times are this rank's."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._waited = 0.0
        self._paused = 0.0
        self._samples = 0
        self._tokens = 0
        self._steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Time spent in here (validation, samples, checkpoints) is not training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def count(self, samples: int, tokens: int) -> None:
        """One optimizer step over `samples` clips and `tokens` positions, all ranks together."""
        self._samples += samples
        self._tokens += tokens
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Rates since the last read: seconds per step, samples/s, tokens/s, share of data wait."""
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        row = {
            "seconds_per_step": seconds / max(self._steps, 1),
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "data_wait": self._waited / seconds,
            "memory_gb": peak_memory_gb(),
        }
        self._reset()
        return row


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
