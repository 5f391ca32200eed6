"""What a forward pass costs: the numerator of MFU. A training step costs three times as much:
model FLOPs count no recomputation."""

import math
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from longtake.models.dit import DiTConfig
from longtake.models.vae import VAE
from longtake.models.vae_config import VAEConfig


def forward_flops(
    config: DiTConfig, num_tokens: int, *, text_rows: int, text_keys: int, num_levels: int = 1
) -> int:
    """Floating-point operations of one sample; a multiply-add counts two, as in FlopCounterMode.

    num_tokens: video tokens N. text_rows: rows of text that are projected, equal padding rows once.
    text_keys: keys of text that every token attends to, padding included. num_levels: noise levels
    K; finding each token's level is not counted.
    """
    dim, patch_volume = config.hidden_size, math.prod(config.patch_size)
    per_token = (config.in_channels + config.out_channels) * patch_volume * dim + config.depth * (
        (4 + 2) * dim**2 + 2 * dim * config.ffn_dim  # self-attention, cross-attention, MLP
    )
    per_row = (config.text_dim + dim) * dim + config.depth * 2 * dim**2
    per_level = (config.freq_dim + dim + 6 * dim) * dim
    pairs = config.depth * num_tokens * (num_tokens + text_keys)  # of queries and keys
    products = num_tokens * per_token + text_rows * per_row + num_levels * per_level
    return 2 * (products + 2 * dim * pairs)


def vae_forward_flops(config: VAEConfig, frames: int, height: int, width: int) -> int:
    """Floating-point operations that encode and decode one clip; zeros before the first frame count
    like frames. ValueError as `VAEConfig.latent_shape`.

    Counted of clips of four and eight latents a frame and carried on: convolutions cost alike at
    every place, attention as the square of a frame's places, and every frame behind the second
    like the one before.
    """
    length, *size = config.latent_shape(frames, height, width)
    places, least = math.prod(size), min(length, 2)
    few, more = (_count(config, least, number) for number in (4, 8))
    square = (more - 2 * few) / (32 * least)  # of places squared, per frame
    linear = (few - 16 * square * least) / 4
    if length > 2:
        step = (_count(config, 3, 4) - few) / 4 - 4 * square
        linear += step * (length - 2)
    return round(places * linear + places**2 * square * length)


@cache
@torch.enable_grad()  # the counter does not know the fused attention that runs without
def _count(config: VAEConfig, length: int, places: int) -> int:
    """FlopCounterMode on a clip of so many latent frames and places, without content."""
    st, sh, sw = config.strides
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        video = torch.empty(2, config.in_channels, 1 + st * (length - 1), 2 * sh, places // 2 * sw)
        VAE(config)(video, torch.empty(2, config.z_dim, length, 2, places // 2))
    return counter.get_total_flops() // 2  # one clip alone may be cut up for the CPU
