"""Rectified flow (arXiv 2209.03003), stated once: t = 0 is clean, t = 1 is noise.

noisy = (1 − t)·clean + t·noise, and the network's target is velocity = noise − clean. A network may
also predict the clean latents; its loss is still the squared error of the velocity they imply.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["velocity", "clean"]
Distribution = Literal["logit_normal", "uniform", "mode"]

# Under clean prediction the velocity error is the clean error / t²; t is held at this floor so that
# nearly clean samples do not own the loss (arXiv 2511.13720 §4).
LOSS_MIN_T = 0.05


@dataclass(frozen=True)
class TimestepConfig:
    """Distribution of training noise levels (SD3, arXiv 2403.03206 §3.1).

    `distribution` for a share of 1 − `uniform_share`, uniform for the rest, then shifted towards
    noise by `shift` (1 leaves it): of every sample, or with `base_tokens` of one with so many
    video tokens, others by the root of their ratio to it.
    """

    mean: float = 0.0  # of the logit-normal
    std: float = 1.0
    uniform_share: float = 0.1
    shift: float = 1.0
    distribution: Distribution = "logit_normal"
    mode_scale: float = 1.29  # of mode sampling: > 0 prefers the middle, < 0 the ends
    base_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"timesteps.std={self.std} must be positive")
        if not 0 <= self.uniform_share <= 1:
            raise ValueError(f"timesteps.uniform_share={self.uniform_share} must be in [0, 1]")
        if self.shift <= 0:
            raise ValueError(f"timesteps.shift={self.shift} must be positive; 1 shifts nothing")
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"timesteps.mode_scale={self.mode_scale} must be in [-1, {2 / (math.pi - 2):.3f}]: "
                "beyond it, mode sampling is no distribution"
            )
        if self.base_tokens is not None and self.base_tokens < 1:
            raise ValueError(f"timesteps.base_tokens={self.base_tokens} must be positive, or null")


def sample_timesteps(
    uniform: Tensor, normal: Tensor, config: TimestepConfig, num_tokens: Tensor | None = None
) -> Tensor:
    """Noise levels (B,) from per-sample draws: uniform in [0, 1) and standard normal, both (B,).

    `num_tokens` (B,) counts each sample's video tokens; `config.base_tokens` asks for it.
    """
    share = config.uniform_share
    if config.distribution == "logit_normal":
        levels = torch.sigmoid(config.mean + config.std * normal)
    elif config.distribution == "mode":
        levels = _mode(torch.special.ndtr(normal), config.mode_scale)
    else:
        levels, share = uniform, 0.0
    flat = uniform / share if share > 0 else uniform
    shift: float | Tensor = config.shift
    if config.base_tokens is not None:
        assert num_tokens is not None
        shift = shift * shift_for_tokens(num_tokens, config.base_tokens)
    return shift_timesteps(torch.where(uniform < share, flat, levels), shift)


def _mode(u: Tensor, scale: float) -> Tensor:
    """Mode sampling with heavy tails (SD3, eq. 20) of u uniform in [0, 1]."""
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def shift_timesteps(t: Tensor, shift: float | Tensor) -> Tensor:
    """shift·t / (1 + (shift − 1)·t): keeps 0 and 1, moves the rest towards noise for shift > 1."""
    return shift * t / (1 + (shift - 1) * t)


def shift_for_tokens(num_tokens: Tensor, base_tokens: int) -> Tensor:
    """√(num_tokens / base_tokens): equal destruction at every size (SD3, eq. 23)."""
    return (num_tokens / base_tokens).sqrt()


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """(1 − t)·clean + t·noise; t (B,), or broadcastable to the latents (B, C, T, H, W)."""
    t = _expand(t, clean)
    return clean + t * (noise - clean)


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """noise − clean."""
    return noise - clean


def velocity_from_clean_prediction(
    clean: Tensor, noisy: Tensor, t: Tensor, *, min_t: float = 1e-3
) -> Tensor:
    """Velocity implied by predicted clean latents: (noisy − clean) / max(t, min_t)."""
    return (noisy - clean) / _expand(t, clean).clamp_min(min_t)


def as_velocity(output: Tensor, noisy: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """Velocity of a network's output under its parameterisation; shapes (B, C, T, H, W)."""
    if prediction == "velocity":
        return output
    return velocity_from_clean_prediction(output, noisy, t)


def flow_loss(
    output: Tensor,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    given: Tensor,
    *,
    prediction: Prediction,
    patch_size: tuple[int, int, int],
) -> Tensor:
    """Sum over each sample's noisy tokens of the mean squared velocity error in a token: (B,) fp32.

    output, clean, noise (B, C, T, H, W); t (B,) level of the noisy tokens; given (T, H, W) or
    (B, T, H, W) bool, True where the latents were given and bear no loss. Dividing by the number
    of noisy tokens is the caller's part. A clean prediction is weighted by 1 / max(t, 0.05)².
    """
    output, clean, noise = output.float(), clean.float(), noise.float()
    if prediction == "velocity":
        error = (output - velocity_target(clean, noise)).square().mean(1)  # (B, T, H, W)
    else:
        weight = t.float().clamp_min(LOSS_MIN_T).square()
        error = (output - clean).square().mean(1) / weight.view(-1, 1, 1, 1)
    patch_volume = patch_size[0] * patch_size[1] * patch_size[2]
    return error.masked_fill(given, 0.0).flatten(1).sum(1) / patch_volume


def min_snr_weight(t: Tensor, gamma: float) -> Tensor:
    """Weight of the velocity loss at t that gives the clean error min(SNR, gamma), where
    SNR = ((1 − t) / t)² (arXiv 2303.09556 §3.4): min((1 − t)², gamma·t²)."""
    return torch.minimum((1 - t).square(), gamma * t.square())


def _expand(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 1)) if t.dim() == 1 else t
