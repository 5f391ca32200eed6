"""Sampling by flow-match Euler, from explicit noise.

The noise levels and the update equal those of diffusers' `FlowMatchEulerDiscreteScheduler` with a
fixed shift, so an exported pipeline draws the same video from the same noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from longtake.models.conditioning import noise_levels
from longtake.models.flow import Prediction, as_velocity, shift_timesteps

NUM_TRAIN_LEVELS = 1000  # the stock scheduler's grid; its coarsest level 1/1000 ends the schedule


class Denoiser(Protocol):
    """What the sampler calls: a `DiT`, or anything with its forward."""

    def __call__(
        self,
        latents: Tensor,
        t: Tensor | None,
        text_embeds: Tensor,
        text_lens: Tensor | None = None,
        *,
        levels: Tensor | None = None,
        level_index: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class SamplerConfig:
    """`shift` > 1 spends more steps at high noise; `guidance_scale` 1 switches guidance off."""

    steps: int = 24
    shift: float = 3.0
    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps={self.steps} must be at least 1")
        if self.shift <= 0:
            raise ValueError(f"sampler.shift={self.shift} must be positive; 1 shifts nothing")
        if self.guidance_scale < 1:
            raise ValueError(
                f"sampler.guidance_scale={self.guidance_scale} must be at least 1 (no guidance)"
            )


@dataclass(frozen=True)
class TextInput:
    """Text embeddings (B, L, D), zero after each caption's end, and lengths (B,) on the CPU."""

    embeds: Tensor
    lens: Tensor | None = None


@dataclass(frozen=True)
class Given:
    """Latents (B, C, T, H, W) that are known where `mask` (B, T, H, W) is True."""

    latents: Tensor
    mask: Tensor
    patch_size: tuple[int, int, int]


def schedule(steps: int, shift: float) -> Tensor:
    """Noise levels (steps + 1,), fp32, from 1 down to 0.

    The stock scheduler takes `steps` even levels between the shifted ends of its training grid,
    and shifts them again.
    """
    last = shift_timesteps(torch.tensor(1 / NUM_TRAIN_LEVELS, dtype=torch.float64), shift)
    levels = torch.linspace(1.0, float(last), steps, dtype=torch.float64)
    levels = shift_timesteps(levels, shift)
    return torch.cat((levels, levels.new_zeros(1))).float()


@torch.no_grad()
def sample(
    dit: Denoiser,
    noise: Tensor,
    text: TextInput,
    *,
    config: SamplerConfig,
    prediction: Prediction = "velocity",
    negative: TextInput | None = None,
    given: Given | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents (B, C, T, H, W), fp32, drawn from `noise` of that shape.

    With guidance, v = v(negative) + scale·(v(text) − v(negative)) (arXiv 2207.12598); `negative`
    is the encoding of "" for every sample. Given latents are put in place before every step and
    told to the network as level 0. `on_step(i)` is called after each step.
    Raises ValueError for guidance without `negative`.
    """
    guided = config.guidance_scale != 1
    if guided and negative is None:
        raise ValueError(
            f"sampler.guidance_scale={config.guidance_scale} needs the encoding of the empty "
            "prompt as `negative`; set it to 1 to sample without guidance"
        )
    latents = _put(noise.float(), given)
    for index, (level, following) in enumerate(_pairs(schedule(config.steps, config.shift))):
        t = torch.full((noise.shape[0],), level, device=noise.device)
        levels = level_index = None
        if given is not None:
            levels, level_index = noise_levels(t, given.mask, given.patch_size)

        def velocity(condition: TextInput) -> Tensor:
            output = dit(
                latents,  # noqa: B023 - called before the next step rebinds it
                t,  # noqa: B023
                condition.embeds,
                condition.lens,
                levels=levels,  # noqa: B023
                level_index=level_index,  # noqa: B023
            )
            return as_velocity(output.float(), latents, t, prediction)  # noqa: B023

        direction = velocity(text)
        if guided and negative is not None:
            empty = velocity(negative)
            direction = empty + config.guidance_scale * (direction - empty)
        latents = _put(latents + (following - level) * direction, given)
        if on_step is not None:
            on_step(index)
    return latents


def _pairs(levels: Tensor) -> list[tuple[float, float]]:
    return list(pairwise(levels.tolist()))


def _put(latents: Tensor, given: Given | None) -> Tensor:
    if given is None:
        return latents
    return torch.where(given.mask[:, None], given.latents.float(), latents)
