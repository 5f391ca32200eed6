"""The losses of a log row: means over the steps since the last one and over all ranks."""

from __future__ import annotations

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
