"""Batches of clips of any length through a VAE in bounded memory, without gradients.

What fits goes in one pass; else clip by clip, then a clip in chunks of frames, which is equal but
for rounding (≤ 1e-5 in fp32). Only decoding cuts a frame into tiles, which blend where they meet,
and only where the frames of a single latent are too much: latents that are kept must not depend
on how they were computed.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from longtake.models.vae import VAE, Posterior, check_finite, check_layout
from longtake.models.vae_streaming import Tiling, stream_decode, stream_encode

MAX_BYTES = 2**32
"""Of one feature map at the VAE's full resolution in fp32, of which a pass holds about eight."""


@torch.no_grad()
def encode_bounded(vae: VAE, x: Tensor, max_bytes: int = MAX_BYTES) -> Posterior:
    """`vae.encode` of pixels (B, C, T, H, W) of any length; ValueError unless all are finite."""
    check_layout(x, vae.config.in_channels, "video")
    check_finite(x, "video")
    frames = max(1, max_bytes // _frame_bytes(vae, *x.shape[3:]))
    if x.shape[2] > frames:
        chunk = max(frames // vae.strides[0], 1) * vae.strides[0]
        parts = [_join(stream_encode(vae, clip.split(chunk, 2)), 2) for clip in x.split(1)]
    else:
        parts = [vae.encode(clips) for clips in x.split(frames // x.shape[2])]
    return _join(parts, 0)


@torch.no_grad()
def decode_bounded(vae: VAE, z: Tensor, max_bytes: int = MAX_BYTES) -> Tensor:
    """`vae.decode` of latents (B, Z, T', H', W') of any length and size; ValueError unless all
    are finite."""
    check_layout(z, vae.config.z_dim, "latents")
    check_finite(z, "latents")
    time, space, _ = vae.strides
    height, width = z.shape[3] * space, z.shape[4] * space
    frame_bytes = _frame_bytes(vae, height, width)
    frames = max_bytes // frame_bytes
    length = (z.shape[2] - 1) * time + 1
    if length <= frames:
        return torch.cat([vae.decode(clips) for clips in z.split(frames // length)])
    tiling = None
    if time > frames:
        side = math.isqrt(height * width * max_bytes // (time * frame_bytes)) // space
        tiling = Tiling(max(side, 2) * space, max(side // 4, 1) * space)
    chunks = max(1, frames // time)
    parts = [torch.cat([*stream_decode(vae, c.split(chunks, 2), tiling)], 2) for c in z.split(1)]
    return torch.cat(parts)


def _join(parts: Iterable[Posterior], dim: int) -> Posterior:
    means, logvars = zip(*((part.mean, part.logvar) for part in parts), strict=True)
    return Posterior(torch.cat(means, dim), torch.cat(logvars, dim))


def _frame_bytes(vae: VAE, height: int, width: int) -> int:
    """Bytes of one frame of a feature map at full resolution."""
    config = vae.config
    channels = max(config.base_dim, config.decoder_dim)
    return 4 * channels * height * width // config.patch_size**2
