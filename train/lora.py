"""Low-rank adapters on linear layers of the DiT (LoRA, arXiv 2106.09685), by the PEFT library."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from longtake.train.optim import named_like
from longtake.train.schema import LoraConfig

# How PEFT names what it puts in the place of a layer.
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Adapter:
    """The change of one layer's weight (out, in) is up · down, their scale included in `up`."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)


def add_adapters(module: nn.Module, config: LoraConfig) -> None:
    """Put an adapter that changes nothing yet on every target; only adapters are trainable then.

    Targets are linear layers under `dit.`; ValueError for a pattern that fits none.
    """
    import peft  # seconds to import

    linear = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and name.startswith("dit.")
        and name != "dit.patch_embed"  # which is a convolution elsewhere
    }
    targets = named_like(linear, config.targets, "lora.targets")
    module.requires_grad_(False)
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - it is only divided
        target_modules=list(targets),
    )
    peft.inject_adapter_in_model(options, module)


def split_adapters(
    tensors: dict[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
    """Tensors of a checkpoint → those of the plain model, and the adapters by the layer's name."""
    plain = {
        name.replace(BASE, "."): tensor
        for name, tensor in tensors.items()
        if not name.endswith((DOWN, UP))
    }
    layers = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    scale = config.alpha / config.rank
    return plain, {
        name: Adapter(tensors[name + DOWN], scale * tensors[name + UP]) for name in layers
    }


def merge_adapters(tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Tensors of a checkpoint → those of a plain model that computes the same."""
    plain, adapters = split_adapters(tensors, config)
    merged = {f"{n}.weight": plain[f"{n}.weight"] + a.up @ a.down for n, a in adapters.items()}
    return plain | merged
