"""Sampling from explicit noise, by flow-match Euler or the multistep solver UniPC.

Noise levels and updates are those of diffusers' `FlowMatchEulerDiscreteScheduler` and
`UniPCMultistepScheduler` with a fixed shift, so an exported pipeline draws the same video from the
same noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from longtake.models.conditioning import noise_levels
from longtake.models.flow import Prediction, add_noise, as_velocity, shift_timesteps
from longtake.models.image_condition import with_channels
from longtake.models.interop import unipc_scheduler
from longtake.models.tokens import Segment

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
        extra: Sequence[Segment] = (),
        extra_t: Tensor | None = None,
    ) -> Tensor: ...


class Solver(Protocol):
    """Walks down the noise `levels` (steps + 1,), from nearly 1 to 0."""

    levels: Tensor
    told: Tensor  # (steps,) what the network is told of the first `steps` levels

    def step(self, index: int, velocity: Tensor, latents: Tensor) -> Tensor:
        """Latents at level index + 1 from those at level `index`, in this order, once each."""
        ...


@dataclass(frozen=True)
class SamplerConfig:
    """`shift` > 1 spends more steps at high noise; `guidance_scale` 1 switches guidance off."""

    steps: int = 24
    shift: float = 3.0
    guidance_scale: float = 4.0
    solver: Literal["euler", "unipc"] = "euler"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"sampler.solver={self.solver} must be one of {', '.join(SOLVERS)}")
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
    """Latents (B, C, T, H, W) that are known where `mask` (B, T, H, W) is True, and `segments`
    that are shown beside them.

    Both are shown at a noise `level`, which the network is told; what is in place is returned
    without it, as it was given.
    """

    latents: Tensor
    mask: Tensor
    patch_size: tuple[int, int, int]
    level: float = 0.0
    segments: Sequence[Segment] = ()


def schedule(steps: int, shift: float) -> Tensor:
    """Noise levels (steps + 1,), fp32, from 1 down to 0, of Euler.

    The stock scheduler takes `steps` even levels between the shifted ends of its training grid,
    and shifts them again.
    """
    last = shift_timesteps(torch.tensor(1 / NUM_TRAIN_LEVELS, dtype=torch.float64), shift)
    levels = torch.linspace(1.0, float(last), steps, dtype=torch.float64)
    levels = shift_timesteps(levels, shift)
    return torch.cat((levels, levels.new_zeros(1))).float()


class Euler:
    """First order: a straight line along the velocity."""

    def __init__(self, config: SamplerConfig) -> None:
        self.levels = schedule(config.steps, config.shift)
        self.told = self.levels[:-1]

    def step(self, index: int, velocity: Tensor, latents: Tensor) -> Tensor:
        """A step of `Solver`."""
        level, following = self.levels[index : index + 2].tolist()
        return latents + (following - level) * velocity


class UniPC:
    """Second order from the steps before (arXiv 2302.04867), by diffusers."""

    def __init__(self, config: SamplerConfig) -> None:
        self._stock = unipc_scheduler(config.shift)
        self._stock.set_timesteps(config.steps)
        self.levels = self._stock.sigmas.float()
        self.told = self._stock.timesteps / NUM_TRAIN_LEVELS  # whole thousandths, as it tells them

    def step(self, index: int, velocity: Tensor, latents: Tensor) -> Tensor:
        """A step of `Solver`."""
        time = self._stock.timesteps[index]
        return self._stock.step(velocity, time, latents, return_dict=False)[0]


SOLVERS: dict[str, Callable[[SamplerConfig], Solver]] = {"euler": Euler, "unipc": UniPC}


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
    channels: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents (B, C, T, H, W), fp32, drawn from `noise` of that shape.

    With guidance, v = v(negative) + scale·(v(text) − v(negative)) (arXiv 2207.12598); `negative`
    is the encoding of "" for every sample, or of what is not wanted. Given latents are put in place
    before every step and told to the network at their own level; they are returned as given.
    `channels` (B, C', T, H, W) are shown behind the latents (see `image_condition`).
    `on_step(i)` is called after each step. Raises ValueError for guidance without `negative`.
    """
    guided = config.guidance_scale != 1
    if guided and negative is None:
        raise ValueError(
            f"sampler.guidance_scale={config.guidance_scale} needs the encoding of the empty "
            "prompt as `negative`; set it to 1 to sample without guidance"
        )
    solver = SOLVERS[config.solver](config)
    noise = noise.float()
    known = None
    if given is not None and given.level > 0:
        known = replace(given, latents=add_noise(given.latents.float(), noise, _filled(given)))
    latents = _put(noise, known or given)
    for index, (level, told) in enumerate(zip(solver.levels.tolist(), solver.told, strict=False)):
        sigma, t = (
            torch.full(noise.shape[:1], float(x), device=noise.device) for x in (level, told)
        )
        levels = level_index = filled = None
        if given is not None:
            filled = _filled(given)
            levels, level_index = noise_levels(t, given.mask, given.patch_size, filled)

        def velocity(condition: TextInput) -> Tensor:
            output = dit(
                with_channels(latents, channels),  # noqa: B023 - called before it is rebound
                t,  # noqa: B023
                condition.embeds,
                condition.lens,
                levels=levels,  # noqa: B023
                level_index=level_index,  # noqa: B023
                extra=() if given is None else given.segments,
                extra_t=filled,  # noqa: B023
            )
            return as_velocity(output.float(), latents, sigma, prediction)  # noqa: B023

        direction = velocity(text)
        if guided and negative is not None:
            empty = velocity(negative)
            direction = empty + config.guidance_scale * (direction - empty)
        latents = _put(solver.step(index, direction, latents), known or given)
        if on_step is not None:
            on_step(index)
    return _put(latents, given)


def _filled(given: Given) -> Tensor:
    """(B,) levels of what is given."""
    return torch.full(given.mask.shape[:1], given.level, device=given.latents.device)


def _put(latents: Tensor, given: Given | None) -> Tensor:
    if given is None:
        return latents
    return torch.where(given.mask[:, None], given.latents.float(), latents)
