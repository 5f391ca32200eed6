"""Strategy `ddp`: every rank holds everything, gradients are summed once per step.

The reduction is our own. Torch's wrapper averages, counts on every parameter being used, and wants
each forward to go through it; a step here may mix images and video, whose micro-batches use
different parameters on different ranks, and its gradients are sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from longtake.train.optim import OptimConfig, build_adamw, create_state
from longtake.train.ranks import Ranks
from longtake.train.strategy import MOMENTS, StateRange, StepResult, clipped_step, detached, whole

# torch 2.13 renamed it and warns of the old name, older ones know only that
_NEW = hasattr(dist, "all_gather_single")
all_gather = dist.all_gather_single if _NEW else dist.all_gather_into_tensor

BUCKET_ELEMENTS = 8 * 2**20  # 32 MiB of fp32: large enough for the wire, small enough to overlap


class GradientSum:
    """Sums gradients over ranks during the last backward of a step, bucket after bucket.

    A bucket leaves when its last gradient is there and all buckets before it have left; whatever a
    rank did not use leaves at the end, as zeros. So all ranks issue the same collectives in the
    same order, whichever parameters they used.
    """

    def __init__(self, parameters: list[nn.Parameter], world_size: int) -> None:
        self.buckets: list[list[nn.Parameter]] = []
        self.enabled = world_size > 1
        size = BUCKET_ELEMENTS
        for parameter in reversed(parameters):  # about the order in which backward reaches them
            if size >= BUCKET_ELEMENTS:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += parameter.numel()
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.armed = False
        self.missing: list[int] = []
        self.sums: list[torch.Tensor] = []
        self.works: list[Any] = []
        if self.enabled:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self.on_gradient)

    def arm(self) -> None:
        """The next backward is the step's last: its gradients complete the rank's sums."""
        self.armed = self.enabled
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sums, self.works = [], []

    def on_gradient(self, parameter: nn.Parameter) -> None:
        if not self.armed:
            return
        self.missing[self.bucket_of[parameter]] -= 1
        while len(self.sums) < len(self.buckets) and self.missing[len(self.sums)] == 0:
            self.send()

    def send(self) -> None:
        flat = torch.cat([gradient_of(p).view(-1) for p in self.buckets[len(self.sums)]])
        self.sums.append(flat)
        self.works.append(dist.all_reduce(flat, async_op=True))

    def finish(self) -> None:
        """Afterwards every `grad` is the sum over ranks; parameters that none used have zeros."""
        if not self.enabled:
            for parameter in self.bucket_of:
                parameter.grad = gradient_of(parameter)
            return
        self.armed = False
        while len(self.sums) < len(self.buckets):
            self.send()
        for bucket, flat, work in zip(self.buckets, self.sums, self.works, strict=True):
            work.wait()
            parts = flat.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        self.sums, self.works = [], []


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient, or zeros for a parameter that the step did not use: it still decays."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()


class ReplicatedStrategy:
    """Full parameters, moments and gradients on every rank; on one process the plain module."""

    def __init__(self, module: nn.Module, optimizer_config: OptimConfig, ranks: Ranks) -> None:
        self.module = module
        self.ranks = ranks
        self.optimizer = build_adamw(module, optimizer_config, ranks)
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        for parameter in self.named.values():
            create_state(self.optimizer, parameter)
            if ranks.world_size > 1:
                dist.broadcast(parameter.data, src=0)
        self.gradients = GradientSum(list(self.named.values()), self.sum_world_size())

    def sum_world_size(self) -> int:
        """Ranks over which this strategy itself sums the gradients."""
        return self.ranks.world_size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if last:
            self.gradients.arm()
        loss.backward()
        if last:
            self.gradients.finish()

    def whole_weights(self, module: nn.Module) -> AbstractContextManager[dict[str, torch.Tensor]]:
        return nullcontext(detached(module))

    def clip_and_step(self, lr: float, max_grad_norm: float) -> StepResult:
        """Equal on all ranks without talking: each sees the same bits of the summed gradients."""
        norms = torch._foreach_norm([p.grad for p in self.named.values() if p.grad is not None])
        norm = torch.linalg.vector_norm(torch.stack(norms))
        return clipped_step(self.optimizer, norm, lr, max_grad_norm)

    def held_ranges(self) -> Iterator[StateRange]:
        for name, parameter in self.named.items():
            yield whole("param", name, parameter)
            for kind in MOMENTS:
                yield whole(kind, name, self.optimizer.state[parameter][kind])

    def owned_ranges(self) -> Iterator[StateRange]:
        for held in self.held_ranges():
            yield held.cut(self.ranks.rank, self.ranks.world_size)

    def set_optimizer_steps(self, optimizer_steps: int) -> None:
        for parameter in self.named.values():
            self.optimizer.state[parameter]["step"].fill_(optimizer_steps)

    def refresh(self) -> None:
        """Every rank sends its share of each parameter to all others, some parameters at a time."""
        if self.ranks.world_size == 1:
            return
        held = [whole("param", name, parameter) for name, parameter in self.named.items()]
        batch: list[StateRange] = []
        size = 0
        for piece in held:
            batch.append(piece)
            size += piece.stop
            if size >= BUCKET_ELEMENTS:
                self.exchange(batch)
                batch, size = [], 0
        if batch:
            self.exchange(batch)

    def exchange(self, batch: list[StateRange]) -> None:
        """All-gathers the shares of `batch`, padded so that every rank sends as much."""
        world_size = self.ranks.world_size
        shares = [-(-piece.stop // world_size) for piece in batch]
        sent = torch.zeros(sum(shares), device=batch[0].tensor.device)
        offset = 0
        for piece, share in zip(batch, shares, strict=True):
            own = piece.cut(self.ranks.rank, world_size).tensor
            sent[offset : offset + own.numel()] = own
            offset += share
        received = torch.empty(world_size, sent.numel(), device=sent.device)
        all_gather(received.view(-1), sent)
        offset = 0
        for piece, share in zip(batch, shares, strict=True):
            for rank in range(world_size):
                other = piece.cut(rank, world_size).tensor
                other.copy_(received[rank, offset : offset + other.numel()])
            offset += share
