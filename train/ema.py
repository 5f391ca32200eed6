"""Exponential moving average of the fp32 master parameters, sharded as the strategy shards them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from longtake.train.engine import Engine
from longtake.train.strategy import StateRange, StateReader


@dataclass(frozen=True)
class EmaConfig:
    """What the mean remembers: a fixed number of steps, or a fixed share of the training so far."""

    decay: float  # reached as min(decay, (1 + step) / (10 + step))
    sigma_rel: float | None = None  # width of a power function in shares of the run; then no decay

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"ema.decay={self.decay} must lie in [0, 1)")
        if self.sigma_rel is not None and not 0.0 < self.sigma_rel < 12**-0.5:
            raise ValueError(
                f"ema.sigma_rel={self.sigma_rel} must lie in (0, 0.288), such as 0.1; null takes "
                "ema.decay"
            )

    @cached_property
    def exponent(self) -> float:
        """γ of the profile t^γ whose relative deviation is sigma_rel (EDM2, arXiv 2312.02696 §3.1).

        σ² = (γ + 1) / ((γ + 2)² (γ + 3)) is a cubic in γ.
        """
        assert self.sigma_rel is not None
        inverse = self.sigma_rel**-2
        return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())

    def decay_at(self, step: int) -> float:
        """What the mean keeps of itself at optimizer step `step` (from 1).

        A decay grows slowly, so that the first weights, which are noise, are forgotten early (the
        schedule of TensorFlow's ExponentialMovingAverage). A power function's is (1 − 1/t)^(γ+1).
        """
        if self.sigma_rel is None:
            return min(self.decay, (1.0 + step) / (10.0 + step))
        return (1.0 - 1.0 / step) ** (self.exponent + 1.0)


class Ema:
    """Running mean of the parameters: each rank keeps the mean of the ranges it owns."""

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        """Starts at the engine's present parameters."""
        self.config = config
        self.is_swapped = False
        self.parameters = trainable_ranges(engine)
        self.means = [owned.tensor.detach().clone() for owned in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters after optimizer step `step` (from 1) into the mean."""
        assert not self.is_swapped, "the module holds the mean itself"
        weight = 1.0 - self.config.decay_at(step)
        if self.means:
            torch._foreach_lerp_(self.means, [owned.tensor for owned in self.parameters], weight)

    def owned_ranges(self) -> Iterator[StateRange]:
        """The ranges of kind `ema` that this rank writes to a checkpoint."""
        assert not self.is_swapped, "the mean is in the module"
        for owned, mean in zip(self.parameters, self.means, strict=True):
            yield replace(owned, kind="ema", tensor=mean)

    @torch.no_grad()
    def load_ranges(self, reader: StateReader) -> None:
        """Reads the mean; from the parameters where the checkpoint holds none."""
        for owned, mean in zip(self.parameters, self.means, strict=True):
            kind = "param" if reader.shape("ema", owned.name) is None else "ema"
            mean.copy_(reader.read(kind, owned.name, owned.start, owned.stop))

    @contextmanager
    def swapped(self, engine: Engine) -> Iterator[None]:
        """Within it the module computes with the mean; all ranks enter and leave together.

        An error leaves the mean in place: swapping back is a collective that nobody would join.
        """
        self.exchange(engine)
        yield
        self.exchange(engine)

    @torch.no_grad()
    def exchange(self, engine: Engine) -> None:
        """Swaps the contents of parameters and mean: one tensor of extra memory."""
        for owned, mean in zip(self.parameters, self.means, strict=True):
            parameter = owned.tensor.clone()
            owned.tensor.copy_(mean)
            mean.copy_(parameter)
        self.is_swapped = not self.is_swapped
        engine.refresh()


def trainable_ranges(engine: Engine) -> list[StateRange]:
    """The owned ranges of the trainable parameters, as live views."""
    ranges = engine.owned_ranges()
    return [r for r in ranges if r.kind == "param" and r.name in engine.shapes]
