"""What a stage trains: the loss of a batch, its validation, and what it draws to look at.

A task never sees ranks. Its loss is a sum over the samples of a micro-batch; the trainer divides by
the global step's total weight, so slots of any content count alike on any number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from longtake.data.loader import Batch
from longtake.data.plan import PlannedSample
from longtake.data.randomness import generator
from longtake.models.transfer import to_device
from longtake.train.engine import Engine
from longtake.train.strategy import StepResult


@dataclass(frozen=True)
class Grouped:
    """Sums (K,) over the samples of each group, detached, and what they are to be divided by.

    The names are the same in every micro-batch of a run; a group without weight is not reported.
    """

    names: tuple[str, ...]
    totals: Tensor
    weights: Tensor

    @classmethod
    def of(cls, names: Sequence[str], index: Tensor, totals: Tensor, weights: Tensor) -> Grouped:
        """Sums of values of samples (B,) by the group (B,) each belongs to."""
        empty, index = totals.new_zeros(len(names)), to_device(index, totals.device)
        sums = [empty.index_add(0, index, values.to(empty)) for values in (totals, weights)]
        return cls(tuple(names), *sums)


@dataclass(frozen=True)
class LossSum:
    """Sums over a micro-batch, each to be divided by the weight of the global step.

    total () fp32 carries the gradient; parts are detached () tensors to be logged under their name.
    `critic` () carries the gradient of a second network, which has an engine of its own. `groups`
    bring their own denominators.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    critic: Tensor | None = None
    groups: tuple[Grouped, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """A clip to look at: frames uint8 (T, H, W, 3) and what it shows."""

    name: str
    frames: np.ndarray
    fps: float
    caption: str


class Means:
    """Running means by name, to be added up over ranks.

    `summary` turns the means of all ranks into what is reported, where that is something else.
    """

    def __init__(
        self, summary: Callable[[dict[str, float]], dict[str, float]] | None = None
    ) -> None:
        self.sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.summary = summary

    def add(self, name: str, total: float, weight: float) -> None:
        """Count a sum of values of that total weight."""
        self.sums[name][0] += total
        self.sums[name][1] += weight

    def merged(self, others: Iterable[dict[str, list[float]]]) -> dict[str, float]:
        """Means over all ranks' sums, in the order of the names."""
        everything = Means()
        for other in others:
            for name, (total, weight) in other.items():
                everything.add(name, total, weight)
        means = {name: total / weight for name, (total, weight) in sorted(everything.sums.items())}
        return means if self.summary is None else self.summary(means)


class Opponent(Protocol):
    """A second network, trained against the first by an engine of its own."""

    engine: Engine

    def finish_step(self, step: int, weight: float) -> None:
        """Take its optimizer step, if it learns at `step`."""
        ...

    @property
    def last_result(self) -> StepResult | None:
        """What came of the last lesson, if the last step had one."""
        ...

    def row(self) -> dict[str, float]:
        """What belongs in the log of the step just finished."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON of all that is not in the engine."""
        ...

    def load(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """One stage. `module` is what the engine trains; every rank calls everything alike."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def adversary(self) -> Opponent | None: ...

    def weight(self, batch: Batch) -> float:
        """What the batch counts in the denominator of its step."""
        ...

    def tokens(self, batch: Batch) -> int:
        """Positions the model works on for this batch, for the throughput."""
        ...

    def flops(self, batch: Batch) -> float:
        """Operations of a training step on this batch, forward and backward without recomputation,
        a multiply-add counting two; 0 where it is not known."""
        ...

    def loss(self, engine: Engine, batch: Batch) -> LossSum: ...

    def changes_loss(self, step: int) -> bool:
        """Whether the loss of optimizer step `step` is not to be compared with those before."""
        ...

    def validate(self, engine: Engine, batches: Iterable[Batch]) -> Means:
        """Sums over a rank's share of the validation pass, with the weights now in the module."""
        ...

    def draw(self, engine: Engine, batches: Sequence[Batch]) -> list[Drawing]:
        """Clips to look at; `batches` is the head of the validation pass, the same on all ranks."""
        ...


def normal_draws(samples: Sequence[PlannedSample], shape: tuple[int, ...], purpose: str) -> Tensor:
    """Standard normal (B, *shape), each row from its own sample's seed: equal on any rank."""
    rows = [torch.randn(shape, generator=generator(s.seed, purpose)) for s in samples]
    return torch.stack(rows)
