"""Clips of any length and frames of any size through a VAE in bounded memory, without gradients.

In time a clip comes in chunks, and a `Stream` carries over what causal layers look back at: the
result is that of one pass. In space a large frame is cut into tiles that overlap; they know nothing
of each other, and linear ramps over the overlaps hide where they differ.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longtake.models.vae import VAE, Posterior, check_finite, check_layout
from longtake.models.vae_config import VAEConfig
from longtake.models.vae_conv import Stream


@dataclass(frozen=True)
class Tiling:
    """Tiles of at most `size` × `size` pixels, of which neighbours share `overlap` pixels."""

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(
                f"tiles of {self.size} pixels with overlap={self.overlap}: the overlap must be "
                "smaller than the tile, and not negative"
            )

    def cuts(self, length: int, stride: int) -> list[slice]:
        """Where to cut `length` latents of `stride` pixels into tiles of about equal size.

        ValueError unless size and overlap are multiples of the stride.
        """
        if self.size % stride or self.overlap % stride:
            raise ValueError(
                f"tiles of {self.size} pixels with overlap={self.overlap}: both must be multiples "
                f"of {stride}, the VAE's stride"
            )
        size, overlap = self.size // stride, self.overlap // stride
        if length <= size:
            return [slice(0, length)]
        parts = -(-(length - overlap) // (size - overlap))
        edges = [index * (length - overlap) // parts for index in range(parts + 1)]
        return [slice(a, b + overlap) for a, b in pairwise(edges)]


@torch.no_grad()
def stream_encode(
    vae: VAE, chunks: Iterable[Tensor], tiling: Tiling | None = None
) -> Iterator[Posterior]:
    """Chunks (B, C, T, H, W) of one clip → posteriors over its latents, in order.

    Chunks may have any length: frames that do not fill a latent wait for the next chunk. Raises
    ValueError for pixels that are not finite, shapes that the VAE cannot take and, at the end, a
    clip whose frames are not 1 + st·k.
    """

    def moments(x: Tensor, stream: Stream) -> Tensor:
        posterior = vae.encode(x, stream)
        return torch.cat((posterior.mean, posterior.logvar), dim=1)

    tiles = _Tiles(tiling, vae.strides[1])
    for chunk in _whole_latents(_checked(chunks, vae.config.in_channels, "video"), vae.config):
        vae.config.latent_shape(1, *chunk.shape[3:])
        yield Posterior(*tiles.run(moments, chunk, vae.strides[1], 1).chunk(2, dim=1))


@torch.no_grad()
def stream_decode(
    vae: VAE, chunks: Iterable[Tensor], tiling: Tiling | None = None
) -> Iterator[Tensor]:
    """Chunks (B, Z, T', H', W') of one clip's latents → its pixels (B, C, T, H, W), not clamped.

    Chunks may have any length. The clip's first latent gives one frame, the others st each. Raises
    ValueError for latents that are not finite and shapes that the VAE cannot take.
    """
    tiles = _Tiles(tiling, vae.strides[1])
    for chunk in _checked(chunks, vae.config.z_dim, "latents"):
        yield tiles.run(vae.decode, chunk, 1, vae.strides[1])


def tiled_encode(vae: VAE, x: Tensor, tiling: Tiling) -> Posterior:
    """`vae.encode` tile by tile, without gradients; the same where one tile covers the frame."""
    (posterior,) = stream_encode(vae, [x], tiling)
    return posterior


def tiled_decode(vae: VAE, z: Tensor, tiling: Tiling) -> Tensor:
    """`vae.decode` tile by tile, without gradients; the same where one tile covers the frame."""
    (pixels,) = stream_decode(vae, [z], tiling)
    return pixels


class _Tiles:
    """The tiles of one clip, each with its own `Stream`."""

    def __init__(self, tiling: Tiling | None, stride: int) -> None:
        self.tiling, self.stride = tiling, stride
        self.streams: defaultdict[tuple[int, int], Stream] = defaultdict(Stream)

    def run(
        self, function: Callable[[Tensor, Stream], Tensor], x: Tensor, before: int, after: int
    ) -> Tensor:
        """`function` on every tile; a latent is `before` wide in x, `after` in the result."""
        if self.tiling is None:
            return function(x, self.streams[0, 0])
        height, width = (length // before for length in x.shape[3:])
        overlap = self.tiling.overlap // self.stride * after
        strips = []
        for i, row in enumerate(self.tiling.cuts(height, self.stride)):
            strip = x[:, :, :, row.start * before : row.stop * before]
            tiles = [
                function(strip[..., cut.start * before : cut.stop * before], self.streams[i, j])
                for j, cut in enumerate(self.tiling.cuts(width, self.stride))
            ]
            strips.append(_fade(tiles, overlap, dim=-1))
        return _fade(strips, overlap, dim=-2)


def _fade(pieces: Sequence[Tensor], overlap: int, dim: int) -> Tensor:
    """Pieces side by side along `dim`, each fading into the next over their overlap."""
    ramp = torch.arange(1, overlap + 1, device=pieces[0].device) / (overlap + 1)
    ramp = ramp.view(-1, *[1] * (-1 - dim))
    whole = pieces[0]
    for piece in pieces[1:]:
        done = whole.shape[dim] - overlap
        left, ending = whole.split((done, overlap), dim)
        beginning, right = piece.split((overlap, piece.shape[dim] - overlap), dim)
        whole = torch.cat((left, torch.lerp(ending, beginning, ramp), right), dim)
    return whole


def _whole_latents(chunks: Iterable[Tensor], config: VAEConfig) -> Iterator[Tensor]:
    """Cut a clip anew: 1 + st·k frames first, then st·k. ValueError at its end if some are left."""
    time, space, _ = config.strides
    pending, frames = None, 0
    for chunk in chunks:
        frames += chunk.shape[2]
        pending = chunk if pending is None else torch.cat((pending, chunk), dim=2)
        ready = pending.shape[2] - (frames - 1) % time
        if ready > 0:
            yield pending[:, :, :ready]
            pending = pending[:, :, ready:]
    config.latent_shape(frames, space, space)


def _checked(chunks: Iterable[Tensor], channels: int, what: str) -> Iterator[Tensor]:
    """The chunks, if finite and of one shape but for their length; else ValueError."""
    first, frames = None, 0
    for chunk in chunks:
        check_layout(chunk, channels, what)
        batch, height, width = chunk.shape[0], *chunk.shape[3:]
        first = first or (batch, height, width)
        if first != (batch, height, width):
            raise ValueError(
                f"{what}: a chunk has batch, height, width {(batch, height, width)}, the clip "
                f"began with {first}: they must stay the same"
            )
        check_finite(chunk, what, frames)
        frames += chunk.shape[2]
        yield chunk
