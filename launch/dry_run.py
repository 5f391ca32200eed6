"""`longtake train … --dry-run`: what a run would do, without weights, ranks or a run folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from longtake.data.config import shape_name
from longtake.data.plan import Plan, rank_slots
from longtake.launch.compose import as_json
from longtake.models.discriminator import Discriminator
from longtake.models.vae import VAE
from longtake.train.config import check_world_size
from longtake.train.engine import EngineConfig
from longtake.train.lora import add_adapters
from longtake.train.optim import freeze
from longtake.train.schema import DiTRun, VAERun
from longtake.train.text_to_video import TextToVideo

NUM_STEPS = 3  # whose plan is shown


@dataclass(frozen=True)
class Network:
    """A network that is trained: its parameters, and how many of them learn."""

    name: str
    num_parameters: int
    num_trainable: int


def dry_run(config: VAERun | DiTRun, world_size: int) -> None:
    """Print the config as JSON (stdout), then first steps, parameters and memory (stderr).

    ValueError for what does not fit `world_size` ranks. Data that is not here is said, no error:
    a config may be written elsewhere than where it runs.
    """
    check_world_size(config, world_size)
    print(as_json(config))
    for line in (*_plan_lines(config, world_size), *_memory_lines(config, world_size)):
        print(line, file=sys.stderr)


def _plan_lines(config: VAERun | DiTRun, world_size: int) -> Iterator[str]:
    try:
        plan = Plan.from_config(config.data, config.seed)
    except (ValueError, OSError) as error:
        yield f"no plan, the run would end here: {error}"
        return
    yield plan.summary()
    degree = config.engine.sequence_parallel  # ranks in a row that compute a slot together
    for step in range(min(NUM_STEPS, config.train.steps)):
        for rank in range(world_size):
            for slot in rank_slots(plan.num_slots, rank // degree, world_size // degree):
                batch = plan.micro_batch(step, slot)
                shape = shape_name(batch.samples[0].shape)
                keys = ", ".join(sample.key for sample in batch.samples)
                where = f"step {step}, rank {rank}, slot {slot}"
                yield f"{where}: {shape}, cost {batch.cost:.3g}: {keys}"


def _memory_lines(config: VAERun | DiTRun, world_size: int) -> Iterator[str]:
    total = 0.0
    for network in networks(config):
        total += state_bytes(network, config.engine, world_size)
        yield (
            f"{network.name}: {network.num_parameters:,} parameters, "
            f"{network.num_trainable:,} of them trained"
        )
    where = (
        ""
        if config.engine.offload == "none"
        else f", in part elsewhere (engine.offload={config.engine.offload})"
    )
    yield (
        f"memory of each of {world_size} ranks: {total / 1e9:.3f} GB{where} for weights, "
        "gradients, moments and EMA; activations come on top"
    )


def networks(config: VAERun | DiTRun) -> list[Network]:
    """What the run would train, built without memory."""
    built: dict[str, nn.Module] = {}
    with torch.device("meta"):
        if isinstance(config, VAERun):
            built["vae"] = VAE(config.vae)
            freeze(built["vae"], config.freeze)
            if config.loss.adversarial.weight > 0:
                built["discriminator"] = Discriminator(config.discriminator.network)
        else:
            whole = TextToVideo.from_config(config)
            if config.lora is not None:
                add_adapters(whole, config.lora)
            built |= dict(whole.named_children())
    return [
        Network(
            name,
            sum(p.numel() for p in module.parameters()),
            sum(p.numel() for p in module.parameters() if p.requires_grad),
        )
        for name, module in built.items()
    ]


def state_bytes(network: Network, config: EngineConfig, world_size: int) -> float:
    """Bytes that a rank holds of a network between two steps, in fp32: weights, gradients, AdamW's
    two moments and the EMA, which is always divided; DeepSpeed adds master copies of the weights.
    The discriminator's, which has no EMA, are overestimated by that.
    """
    full, share = 4, 4 / world_size  # bytes of a value that each rank holds, or has a part of
    weights, gradients, moments, masters = full, full, 2 * full, 0.0
    if config.strategy == "deepspeed" and config.zero_stage > 0:
        moments, masters = 2 * share, share
        gradients = share if config.zero_stage > 1 else full
        weights = share if config.zero_stage > 2 else full
    elif config.strategy == "fsdp2":
        weights, gradients, moments = share, share, 2 * share
    frozen = network.num_parameters - network.num_trainable
    trained = weights + gradients + moments + masters + share
    return network.num_trainable * trained + frozen * weights
