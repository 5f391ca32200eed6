"""The image-conditioned form of the DiT: given frames come as channels behind the noisy latents.

As in Wan 2.1 and 2.2 I2V (arXiv 2503.20314 §5.1): a model of `out_channels` C has `in_channels`
2·C + st, where st is the VAE's temporal stride; 36 for C = 16 and st = 4. Such a model is called
with `torch.cat((noisy, condition), 1)` and predicts for the noisy latents alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def image_condition(
    video: Tensor, given: Tensor, encode: Callable[[Tensor], Tensor], time_stride: int
) -> Tensor:
    """Mask and latents of the given frames: (B, st + C, T, H', W').

    video (B, 3, F, H, W) in [-1, 1], F = 1 + st·(T − 1); given (B, F) bool. The others are zeroed
    before `encode` turns pixels into normalised latents (B, C, T, H', W'), so nothing of them
    enters. The mask says 1 for given and has a channel for each pixel frame of a latent frame; the
    one pixel frame of the first fills them all.
    """
    latents = encode(torch.where(given[:, None, :, None, None], video, 0.0))
    return with_mask(latents, given, time_stride)


def with_mask(latents: Tensor, given: Tensor, time_stride: int) -> Tensor:
    """The same from latents (B, C, T, H', W') that were encoded already."""
    frames = torch.cat((given[:, :1].expand(-1, time_stride - 1), given), dim=1)  # (B, st·T)
    mask = frames.unflatten(1, (-1, time_stride)).transpose(1, 2)  # (B, st, T)
    mask = mask[..., None, None].expand(-1, -1, -1, *latents.shape[-2:])
    return torch.cat((mask.to(latents), latents), dim=1)


def with_channels(noisy: Tensor, channels: Tensor | None) -> Tensor:
    """What the model is called with: noisy latents (B, C, T, H, W), and behind them what is given
    as channels, where something is."""
    return noisy if channels is None else torch.cat((noisy, channels), dim=1)
