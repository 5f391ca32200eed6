"""Strategy `deepspeed`: ZeRO stages 0 to 3. The only place that imports deepspeed.

DeepSpeed is told fp32, with bf16 by its torch_autocast; it gets torch's fused AdamW; the averaging
over ranks is undone by scaling the loss. Its own checkpoints are not used: the ranges of its fp32
masters and moments are handed out as live views. Written against deepspeed 0.19.8, of whose
internals this module uses `_hp_mapping`, `update_lp_params`, `_get_fp32_opt_state_partition` and
the refresh at the end of its stage-3 step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from longtake.train.ddp_engine import ReplicatedStrategy
from longtake.train.disk import zeros_on_disk
from longtake.train.optim import OptimConfig, build_adamw, create_state
from longtake.train.ranks import Ranks, join_alone
from longtake.train.strategy import MOMENTS, StateRange, StepResult, Strategy, detached

if TYPE_CHECKING:
    from longtake.train.engine import EngineConfig

MAX_BUCKET_ELEMENTS = 50_000_000  # 200 MB of fp32 per reduction buffer


def build_deepspeed(
    module: nn.Module, optimizer_config: OptimConfig, config: EngineConfig, ranks: Ranks
) -> Strategy:
    """The strategy of the config's ZeRO stage around `module`."""
    if config.zero_stage == 0:
        return ReplicatedDeepSpeed(module, optimizer_config, config, ranks)
    return ShardedDeepSpeed(module, optimizer_config, config, ranks)


def import_deepspeed(device_type: str) -> Any:
    """The deepspeed package for "cpu" or "cuda", of which a process can use one."""
    os.environ["DS_ACCELERATOR"] = device_type  # read once, at the first import
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    imported_for = deepspeed.get_accelerator().device_name()
    if imported_for != device_type:
        raise RuntimeError(f"deepspeed was imported for {imported_for}, not for {device_type}")
    if device_type == "cpu":
        # Its shared-memory collectives are compiled at first use (27 s, and needs a compiler).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def initialize(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: EngineConfig,
    ranks: Ranks,
) -> Any:
    """DeepSpeed's engine around module and optimizer, without compiling any extension."""
    deepspeed = import_deepspeed(ranks.device.type)
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # it reads its device from there
    join_alone(ranks)
    backend = "gloo" if ranks.device.type == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_json(module, config, ranks.world_size),
        dist_init_required=False,
    )
    return engine


def deepspeed_json(module: nn.Module, config: EngineConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours."""
    numel = sum(p.numel() for p in module.parameters() if p.requires_grad)
    bucket = min(MAX_BUCKET_ELEMENTS, numel + numel % 2)  # must be even
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # Stage 3 keeps parameters below this size whole; of a small model it shards most as well.
        "stage3_param_persistence_threshold": min(100_000, numel // 100),
    }
    if config.offload != "none":  # the moments' files are ours: see train/disk.py
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients travel in fp32, as under ddp
        },
    }


class ReplicatedDeepSpeed(ReplicatedStrategy):
    """Stage 0: DeepSpeed reduces the gradients, the rest is as under ddp."""

    def __init__(
        self, module: nn.Module, optimizer_config: OptimConfig, config: EngineConfig, ranks: Ranks
    ) -> None:
        super().__init__(module, optimizer_config, ranks)
        self.engine = initialize(module, self.optimizer, config, ranks)

    def sum_world_size(self) -> int:
        return 1  # DeepSpeed sums

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        if last:
            self.gradients.finish()


class ShardedDeepSpeed:
    """Stages 1 to 3: the rank holds the moments and fp32 masters of its shard."""

    def __init__(
        self, module: nn.Module, optimizer_config: OptimConfig, config: EngineConfig, ranks: Ranks
    ) -> None:
        self.ranks = ranks
        self.stage = config.zero_stage
        self.shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
        self.named = dict(module.named_parameters())
        self.engine = initialize(module, build_adamw(module, optimizer_config), config, ranks)
        self.zero = self.engine.optimizer
        self.adamw = self.engine.basic_optimizer
        zeros = torch.zeros_like
        if config.offload == "nvme" and config.offload_path is not None:
            zeros = partial(zeros_on_disk, folder=Path(config.offload_path))
        states = [create_state(self.adamw, master, zeros) for master in self.flat_masters()]
        self.step_counters = [state["step"] for state in states]
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()
        self.accumulation = ExitStack()
        self.accumulating = False

    def flat_masters(self) -> list[torch.Tensor]:
        """DeepSpeed's flat fp32 partitions, which AdamW sees as its parameters."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return list(self.zero.single_partition_of_fp32_groups)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Gradients stay on the rank until the last call, which reduces them all at once."""
        if not self.accumulating:
            self.accumulation.enter_context(self.engine.coalesce_grad_reduction())
            self.accumulating = True
        self.engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        if last:
            if self.stage < 3:  # ranks may have used different parameters: reduce all of them
                for parameter in self.named.values():
                    if parameter.requires_grad and parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            self.accumulating = False
            self.accumulation.close()

    @contextmanager
    def whole_weights(self, module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(module.parameters()), enabled=self.stage == 3):
            yield detached(module)

    def clip_and_step(self, lr: float, max_grad_norm: float) -> StepResult:
        """DeepSpeed computes the norm, clips, and skips a step whose norm is not finite."""
        self.zero.clip_grad = max_grad_norm
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        return StepResult(torch.tensor(float(self.zero._global_grad_norm)))  # inf: skipped

    def held_ranges(self) -> Iterator[StateRange]:
        ranges = self.stage3_ranges() if self.stage == 3 else self.stage12_ranges()
        yield from ranges

    def owned_ranges(self) -> Iterator[StateRange]:
        yield from self.held_ranges()

    def stage12_ranges(self) -> Iterator[StateRange]:
        """From each parameter's fragment of the flat partition, if the rank has one."""
        for name, parameter in self.named.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:
                continue
            address = mapping.lp_fragment_address
            start, stop = address.start, address.start + address.numel
            for kind in ("param", *MOMENTS):
                master = mapping.get_hp_fragment(None if kind == "param" else kind)
                yield StateRange(kind, name, start, stop, self.shapes[name], master.detach())

    def stage3_ranges(self) -> Iterator[StateRange]:
        """Equal shares of each parameter, of which the last ones are padded."""
        for name, parameter in self.named.items():
            numel = parameter.ds_numel
            share = parameter.partition_numel()
            start = min(self.ranks.rank * share, numel)
            stop = min(start + share, numel)
            if not parameter.requires_grad:
                part = parameter.ds_tensor.detach().view(-1)[: stop - start]
                yield StateRange("param", name, start, stop, self.shapes[name], part)
                continue
            for kind in ("param", *MOMENTS):
                state, _ = self.zero._get_fp32_opt_state_partition(
                    parameter,
                    release_swap_buffers=False,
                    optim_state_key=None if kind == "param" else kind,
                )
                part = state.detach()[: stop - start]
                yield StateRange(kind, name, start, stop, self.shapes[name], part)

    def set_optimizer_steps(self, optimizer_steps: int) -> None:
        for counter in self.step_counters:
            counter.fill_(optimizer_steps)

    def refresh(self) -> None:
        """Copies the masters into the weights of the forward, as DeepSpeed does after a step."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for sub_group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
