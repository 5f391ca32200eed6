"""Strategy `fsdp2`: torch's `fully_shard`. Each rank holds rows of every parameter and its state.

Rank r of w holds rows [r·c, (r+1)·c) of each tensor, c = ⌈rows / w⌉, as fp32 masters; a unit's
parameters are gathered when it is called and freed after. FSDP's own averaging and mixed precision
are off: gradients are sums, and bf16 comes by autocast, whose copies of the weights live from a
unit's forward to its backward. AdamW sees the rows as plain tensors. Written against torch 2.13, of
whose internals this module uses `_lazy_init`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from longtake.train.optim import OptimConfig, build_adamw, create_state
from longtake.train.ranks import Ranks, join_alone
from longtake.train.strategy import MOMENTS, StateRange, StepResult, clipped_step, detached


class FullyShardedStrategy:
    """Shards of parameters, gradients and moments; ranks must call the same units in one order."""

    def __init__(self, module: nn.Module, optimizer_config: OptimConfig, ranks: Ranks) -> None:
        self.module = module
        self.ranks = ranks
        self.units = shard(module, ranks)
        self.named = dict(module.named_parameters())
        self.rows = {name: rows_of(parameter) for name, parameter in self.named.items()}
        self.optimizer = build_adamw(module, optimizer_config)
        held = {parameter: self.rows[name] for name, parameter in self.named.items()}
        for group in self.optimizer.param_groups:
            group["params"] = [held[parameter] for parameter in group["params"]]
        self.trained = {n: self.rows[n] for n, p in self.named.items() if p.requires_grad}
        for rows in self.trained.values():
            create_state(self.optimizer, rows)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Gradients stay whole on the rank until the last call, which reduces them unit by unit."""
        for unit in self.units:
            unit.set_requires_gradient_sync(last, recurse=False)
        loss.backward()

    @contextmanager
    def whole_weights(self, module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        for unit in self.units:
            unit.unshard()
        yield detached(module)
        self.refresh()

    def clip_and_step(self, lr: float, max_grad_norm: float) -> StepResult:
        """The same on all ranks: they exchange the sum of squares of their rows."""
        for name, rows in self.trained.items():
            gradient = self.named[name].grad
            # What the step did not use decays all the same.
            rows.grad = torch.zeros_like(rows) if gradient is None else gradient.to_local()
            self.named[name].grad = None
        gradients = [rows.grad for rows in self.trained.values()]
        squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        if self.ranks.world_size > 1:
            dist.all_reduce(squares)
        return clipped_step(self.optimizer, squares.sqrt(), lr, max_grad_norm)

    def held_ranges(self) -> Iterator[StateRange]:
        for name, rows in self.rows.items():
            shape = tuple(self.named[name].shape)
            first = min(self.ranks.rank * -(-shape[0] // self.ranks.world_size), shape[0])
            start = first * math.prod(shape[1:])
            tensors = {"param": rows}
            if name in self.trained:
                tensors |= {kind: self.optimizer.state[rows][kind] for kind in MOMENTS}
            for kind, tensor in tensors.items():
                flat = tensor.view(-1)
                yield StateRange(kind, name, start, start + flat.numel(), shape, flat)

    def owned_ranges(self) -> Iterator[StateRange]:
        yield from self.held_ranges()

    def set_optimizer_steps(self, optimizer_steps: int) -> None:
        for rows in self.trained.values():
            self.optimizer.state[rows]["step"].fill_(optimizer_steps)

    def refresh(self) -> None:
        """Drops what was gathered before: the root keeps its parameters after a forward."""
        for unit in self.units:
            unit.reshard()


def shard(module: nn.Module, ranks: Ranks) -> list[FSDPModule]:
    """Shards rank 0's parameters in place, unit by unit; returns the units, inner ones first.

    The device never holds more than its shards and one whole unit.
    """
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ValueError(
            f"engine.strategy=fsdp2 needs torch >= 2.13, this is {torch.__version__}: update it, "
            "or use engine=deepspeed_zero3"
        )
    join_alone(ranks)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    units = []
    for unit in units_of(module):
        for parameter in unit.parameters():
            if not isinstance(parameter, DTensor):  # else sharded with an inner unit
                parameter.data = parameter.data.to(ranks.device)
                dist.broadcast(parameter.data, src=0)
        units.append(fully_shard(unit, mesh=mesh))
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        unit.set_reduce_scatter_unused_params(True, recurse=False)  # ranks may use others of a unit
    # Now, not at the first forward: it may be that of a unit alone, such as a DiT that samples.
    units[-1]._get_fsdp_state()._lazy_init()
    return units


@torch.no_grad()
def rows_of(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's rows of a sharded parameter, a live view without history."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def units_of(module: nn.Module) -> list[nn.Module]:
    """What is gathered at once: blocks, what holds them, the root; inner ones first.

    A block is an entry of a ModuleList. A child of the root that holds blocks is a unit because it
    may be called without the root.
    """
    lists = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
    units = {module, *(block for each in lists for block in each)}
    for child in module.children():
        if child not in lists and any(each in lists for each in child.modules()):
            units.add(child)
    return [each for each in reversed(list(module.modules())) if each in units]
