"""The losses of a log row: means over the steps since the last one and over all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.train.ranks import Ranks
from longtake.train.tasks import LossSum


class WeightedMean:
    """Loss over the steps since the last log row: sums of all ranks over the plan's weights."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._groups: dict[tuple[str, ...], Tensor] = {}  # names -> totals and weights (2, K)
        self._weight = 0.0

    def add(self, loss: LossSum) -> None:
        """One micro-batch of this rank; stays on the device, no host sync."""
        for name, value in {"loss": loss.total.detach(), **loss.parts}.items():
            self.count(name, value)
        for group in loss.groups:
            both = torch.stack((group.totals, group.weights)).double()
            known = self._groups.get(group.names)
            self._groups[group.names] = both if known is None else known + both

    def count(self, name: str, value: Tensor) -> None:
        """A detached sum () of its own, to be divided by the same weights."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value.double()

    def add_weight(self, weight: float) -> None:
        """The weight of one global step, the same on all ranks."""
        self._weight += weight

    def _mine(self) -> dict[str, Any]:
        return {
            "sums": {name: value.item() for name, value in self._sums.items()},
            "groups": [[list(names), both.tolist()] for names, both in self._groups.items()],
        }

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """What was summed since the last read, by data rank; all ranks together."""
        return {"ranks": ranks.gather_data(self._mine()), "weight": self._weight}

    def load(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Go on from `state`: bit for bit at the same number of ranks, as a total at another."""
        parts, is_same = state["ranks"], len(state["ranks"]) == ranks.num_data_ranks
        share = 1.0 if is_same or ranks.data_rank == 0 else 0.0
        options: Any = {"dtype": torch.double, "device": ranks.device}
        self._sums, self._groups = {}, {}
        for part in [parts[ranks.data_rank]] if is_same else parts:
            for name, value in part["sums"].items():
                self.count(name, share * torch.tensor(value, **options))
            for names, both in part["groups"]:
                values = share * torch.tensor(both, **options)
                self._groups[tuple(names)] = values + self._groups.get(tuple(names), 0.0)
        self._weight = state["weight"]

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Means since the last read; all ranks together."""
        every = ranks.gather_data(self._mine())
        row = {
            name: sum(other["sums"][name] for other in every) / self._weight for name in self._sums
        }
        for number, names in enumerate(self._groups):
            totals, weights = np.sum([other["groups"][number][1] for other in every], axis=0)
            row |= {n: t / w for n, t, w in zip(names, totals, weights, strict=True) if w}
        self._sums, self._groups, self._weight = {}, {}, 0.0
        return row
