"""What every strategy of the engine gives and takes: steps, ranges of state, one interface."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from longtake.models.transfer import HostCopy

MOMENTS = ("exp_avg", "exp_avg_sq")


class StepResult:
    """What came of one optimizer step. Looked at, it waits until the device has told."""

    def __init__(self, grad_norm: torch.Tensor) -> None:
        """`grad_norm` () on the device, equal on all ranks."""
        self._norm = HostCopy(grad_norm)

    @cached_property
    def grad_norm(self) -> float:
        """The global gradient norm before clipping."""
        return self._norm.read().item()

    @property
    def skipped(self) -> bool:
        """Whether the norm was not finite: then no rank changed a weight."""
        return not math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class StateRange:
    """Elements [start, stop) of the row-major buffer of one tensor of the training state.

    tensor is (stop - start,), a live view of the state: writing to it changes the state, but the
    weights that the forward uses follow only at `Engine.refresh`.
    """

    kind: str  # param | exp_avg | exp_avg_sq | buffer | ema
    name: str  # of the unwrapped module
    start: int
    stop: int
    shape: tuple[int, ...]  # of the whole tensor
    tensor: torch.Tensor

    def cut(self, rank: int, world_size: int) -> StateRange:
        """The rank's share of this range when it is split evenly."""
        size = self.stop - self.start
        share = -(-size // world_size)
        first, last = min(rank * share, size), min((rank + 1) * share, size)
        start, stop = self.start + first, self.start + last
        return StateRange(self.kind, self.name, start, stop, self.shape, self.tensor[first:last])


class StateReader(Protocol):
    """Where `Engine.load_ranges` reads from: a checkpoint, or anything that answers alike."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps taken until then; AdamW's bias correction counts them."""
        ...

    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        """Shape of the whole tensor, or None where there is no such tensor."""
        ...

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major buffer, (stop - start,)."""
        ...


class RenamedReader:
    """Another reader's kinds that begin with `prefix`, without it: the state of a second engine."""

    def __init__(self, reader: StateReader, prefix: str, optimizer_steps: int) -> None:
        self.reader, self.prefix, self.optimizer_steps = reader, prefix, optimizer_steps

    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        return self.reader.shape(self.prefix + kind, name)

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        return self.reader.read(self.prefix + kind, name, start, stop)


class Strategy(Protocol):
    """One way to hold and update parameters and moments; `engine.strategy` chooses it.

    Gradients are sums over ranks and micro-batches under every strategy.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...

    def clip_and_step(self, lr: float, max_grad_norm: float) -> StepResult: ...

    def whole_weights(self, module: nn.Module) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """Every parameter of the forward, gathered where ranks hold shards, and detached."""
        ...

    def held_ranges(self) -> Iterator[StateRange]:
        """Parameters and moments in this rank's memory: whole tensors or the rank's shard."""
        ...

    def owned_ranges(self) -> Iterator[StateRange]:
        """The part of `held_ranges` that this rank writes; over all ranks, everything once."""
        ...

    def set_optimizer_steps(self, optimizer_steps: int) -> None: ...

    def refresh(self) -> None:
        """Makes every rank's forward use the parameters in the owned ranges; all ranks together."""
        ...


def clipped_step(
    optimizer: torch.optim.Optimizer,
    norm: torch.Tensor,
    lr: float,
    max_grad_norm: float,
) -> StepResult:
    """A step with gradients clipped by their global `norm` (); none where it is not finite.

    Nothing waits for the device: its fused AdamW is handed the divisor and the flag.
    """
    handed: Any = optimizer
    handed.found_inf = (~norm.isfinite()).float()
    handed.grad_scale = None
    if max_grad_norm > 0:
        handed.grad_scale = ((norm.float() + 1e-6) / max_grad_norm).clamp(min=1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(norm)


def detached(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, without their history."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def whole(kind: str, name: str, tensor: torch.Tensor) -> StateRange:
    """The range that covers a whole contiguous tensor."""
    flat = tensor.detach().view(-1)
    return StateRange(kind, name, 0, flat.numel(), tuple(tensor.shape), flat)
