"""The engine: one small class that trains a module alike under every strategy.

Whatever the strategy, master parameters are fp32, bf16 comes by autocast, gradients are SUMS over
ranks and micro-batches, reduced once per step and clipped by global norm after the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longtake.train.ddp_engine import ReplicatedStrategy
from longtake.train.optim import OptimConfig
from longtake.train.ranks import Ranks, init_distributed, shutdown, single_process
from longtake.train.strategy import StateRange, StateReader, StepResult, Strategy, whole

__all__ = [
    "Engine",
    "EngineConfig",
    "Ranks",
    "StateRange",
    "StateReader",
    "StepResult",
    "init_distributed",
    "shutdown",
    "single_process",
]

STRATEGIES = ("ddp", "fsdp2", "deepspeed")
PRECISIONS = ("bf16", "fp32")
OFFLOADS = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class EngineConfig:
    """How the state is held on the ranks; the losses do not depend on it."""

    strategy: str  # ddp | fsdp2 | deepspeed
    zero_stage: int  # deepspeed only: 0 replicate, 1 shard moments, 2 gradients, 3 parameters
    precision: str  # bf16: autocast over fp32 master weights | fp32
    offload: str  # deepspeed stages 1-3: none | cpu: masters and moments | nvme: moments in files
    offload_path: str | None = None  # nvme: folder of those files, on a disk of this machine
    sequence_parallel: int = 1  # ranks that share each sample's tokens, DiT only; 1: none do

    def __post_init__(self) -> None:
        choices = (("strategy", STRATEGIES), ("precision", PRECISIONS), ("offload", OFFLOADS))
        for key, allowed in choices:
            if getattr(self, key) not in allowed:
                rule = f"must be one of {', '.join(allowed)}"
                raise ValueError(f"engine.{key}={getattr(self, key)} {rule}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        if self.strategy != "deepspeed" and self.zero_stage != 0:
            stage = f"engine.zero_stage={self.zero_stage}"
            raise ValueError(f"{stage} needs engine.strategy=deepspeed, got {self.strategy}")
        if self.offload != "none" and (self.strategy != "deepspeed" or self.zero_stage == 0):
            raise ValueError(
                f"engine.offload={self.offload} needs engine.strategy=deepspeed and "
                f"engine.zero_stage >= 1, got {self.strategy} with stage {self.zero_stage}"
            )
        if (self.offload == "nvme") != (self.offload_path is not None):
            raise ValueError(
                f"engine.offload_path={self.offload_path} with engine.offload={self.offload}: "
                "nvme needs a folder on a local disk, the others none (null)"
            )
        if self.sequence_parallel < 1:
            raise ValueError(f"engine.sequence_parallel={self.sequence_parallel} must be >= 1")

    @property
    def shards_parameters(self) -> bool:
        """Whether each rank holds only a part of every parameter, frozen ones included."""
        return self.strategy == "fsdp2" or self.zero_stage == 3


def native_precision(device: torch.device) -> str:
    """What `engine.precision=auto` stands for: bf16 where the hardware computes in it, else fp32.

    On a CPU without AVX-512 or the like a bf16 product runs in plain loops, 50 times slower.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # no public name for it
    return "bf16" if has_bf16 else "fp32"


class Engine:
    """Trains `module` with AdamW under one strategy.

    Every rank builds it from equal arguments and calls its methods in the same order. `module` is
    moved to the ranks' device, and rank 0's parameters are sent to all.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer_config: OptimConfig,
        config: EngineConfig,
        ranks: Ranks,
    ) -> None:
        check_masters(module)
        self.config = config
        self.ranks = ranks
        self.module = module
        self._optimizer_steps = 0
        self._last: StepResult | None = None  # a step that is not counted yet
        self.shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
        self.aliases = tied_names(module)
        persistent = set(module.state_dict())
        self.strategy = build_strategy(module, optimizer_config, config, ranks)
        self.constants = [("buffer", n, b) for n, b in module.named_buffers() if n in persistent]
        if not config.shards_parameters:
            frozen = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
            self.constants += [("param", name, parameter) for name, parameter in frozen]

    def autocast(self) -> AbstractContextManager:
        """The precision of the forward: bf16 for matrix work, or fp32 unchanged."""
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=bf16)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`module(*args, **kwargs)` under autocast, by the strategy's way in."""
        with self.autocast():
            return self.strategy.forward(*args, **kwargs)

    def whole_weights(self) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """Every parameter, whole and detached, by name: to be read inside the context only.

        All ranks enter together. What is computed with them leaves no gradient in the engine.
        """
        return self.strategy.whole_weights(self.module)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradients of `loss` () to the step's sum; `last` ends the sum over the ranks.

        Every rank calls it with `last` exactly once per step; the number of calls before may
        differ between ranks.
        """
        self.strategy.backward(loss, last=last)

    def clip_and_step(self, lr: float, max_grad_norm: float) -> StepResult:
        """Clips the summed gradients by global norm (0 never) and takes one AdamW step.

        A norm that is not finite skips the step on all ranks alike. Under ddp and fsdp2 nobody
        waits for the device before the result, or that of the step before, is looked at.
        """
        self._count_last()
        self._last = self.strategy.clip_and_step(lr, max_grad_norm)
        return self._last

    @property
    def optimizer_steps(self) -> int:
        """Steps taken, skipped ones left out; waits for the device where the last is not known."""
        self._count_last()
        return self._optimizer_steps

    def _count_last(self) -> None:
        if self._last is not None:
            self._optimizer_steps += not self._last.skipped
            self._last = None

    def owned_ranges(self) -> Iterator[StateRange]:
        """What this rank writes to a checkpoint; over all ranks, every element exactly once."""
        for owned in self.strategy.owned_ranges():
            if owned.start < owned.stop:
                yield owned
        for kind, name, tensor in self.constants:
            if tensor.numel():
                owned = whole(kind, name, tensor.contiguous())
                owned = owned.cut(self.ranks.rank, self.ranks.world_size)
                if owned.start < owned.stop:
                    yield owned

    @torch.no_grad()
    def load_ranges(self, reader: StateReader) -> None:
        """Replaces parameters, moments, buffers and the step counter; all ranks together.

        Errors: ValueError when the names or shapes of the parameters differ from the reader's.
        """
        for name, shape in self.shapes.items():
            stored = reader.shape("param", name)
            if stored != shape:
                found = "is missing" if stored is None else f"has shape {stored}"
                raise ValueError(
                    f"{name} {found} in the checkpoint, the model has {shape}: "
                    "use the config the checkpoint was written with, or a new run folder"
                )
        for held in self.strategy.held_ranges():
            if held.start < held.stop:
                held.tensor.copy_(reader.read(held.kind, held.name, held.start, held.stop))
        for kind, name, tensor in self.constants:
            if tensor.numel():
                tensor.copy_(reader.read(kind, name, 0, tensor.numel()).view_as(tensor))
        self._optimizer_steps, self._last = reader.optimizer_steps, None
        self.strategy.set_optimizer_steps(reader.optimizer_steps)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes every rank's forward use the parameters in the owned ranges; all ranks together."""
        self.strategy.refresh()


def build_strategy(
    module: nn.Module, optimizer_config: OptimConfig, config: EngineConfig, ranks: Ranks
) -> Strategy:
    """The strategy of the config around `module`, which it moves to the ranks' device."""
    # What is not needed is not imported: both libraries are slow to.
    if config.strategy == "deepspeed":
        from longtake.train.deepspeed_engine import build_deepspeed

        return build_deepspeed(module.to(ranks.device), optimizer_config, config, ranks)
    if config.strategy == "fsdp2":
        from longtake.train.fsdp_engine import FullyShardedStrategy

        return FullyShardedStrategy(module, optimizer_config, ranks)
    return ReplicatedStrategy(module.to(ranks.device), optimizer_config, ranks)


def check_masters(module: nn.Module) -> None:
    """ValueError unless every trainable parameter is fp32 and row-major."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} is {parameter.dtype}, but trainable parameters are fp32 masters: "
                "build the module in fp32, engine.precision=bf16 computes in bf16 by autocast"
            )
        if parameter.requires_grad and not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous: keep parameters row-major")


def tied_names(module: nn.Module) -> dict[str, str]:
    """Second names of parameters that are tied: name in the state dict -> name of the first."""
    first = {parameter: name for name, parameter in module.named_parameters()}
    everything = module.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in everything if name != first[p]}
