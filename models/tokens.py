"""From latents to the token sequence that the DiT sees, and back.

A sequence holds a batch of videos of one size, or a pack: videos of any sizes, one behind the
other. Behind each video stand the segments that are given beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.models.layers import RotaryTable, patchify, token_grid, unpatchify


@dataclass(frozen=True)
class Segment:
    """Given latents that were encoded alone, such as those of a clip's last frames.

    latents (B, C, t, h, w), or (C, t, h, w) for a sample of a pack. `start` is the latent frame of
    the video where they stand; a fraction lies between two. Their tokens follow those of the video,
    with the rotary coordinates of that place, and nothing is predicted for them.
    """

    latents: Tensor
    start: float


@dataclass(frozen=True)
class Video:
    """A sample of a pack: latents (C, T, H, W), the level of each token (N,) and what is given
    beside them."""

    latents: Tensor
    level_index: Tensor | None = None
    extra: Sequence[Segment] = ()


@dataclass(frozen=True)
class TokenSequence:
    """Tokens before they are embedded, and what is known of each.

    patches (B, N, C·pt·ph·pw), rope (N, H, Dh/2). rows (B, N) says where in the table of levels,
    (B·K, D), a token finds its own; None: each sample has one. `grids` of the videos in a row of
    the batch, which with their segments have `lengths` tokens; only a pack has several of them.
    """

    patches: Tensor
    rope: Tensor
    rows: Tensor | None
    grids: tuple[tuple[int, int, int], ...]
    lengths: tuple[int, ...]

    @property
    def num_pads(self) -> int:
        """Tokens at the end that belong to nobody."""
        return self.patches.shape[1] - sum(self.lengths)


class Sequencer:
    """Makes sequences for a patch size and a kind of heads; holds no weights."""

    def __init__(self, patch_size: tuple[int, int, int], num_heads: int, head_dim: int) -> None:
        self.patch_size = patch_size
        self.rope = RotaryTable(num_heads, head_dim)

    def batch(
        self,
        latents: Tensor,
        num_levels: int,
        level_index: Tensor | None = None,
        extra: Sequence[Segment] = (),
    ) -> TokenSequence:
        """latents (B, C, T, H, W) at level_index (B, N) or 0, `extra` at the last of the levels.

        Raises:
            ValueError: the patch size does not divide latents, or a segment is of another batch.
        """
        pieces = [Segment(latents, 0.0), *extra]
        grids = [token_grid(piece.latents.shape[2:], self.patch_size) for piece in pieces]
        for segment in extra:
            if segment.latents.shape[:2] != latents.shape[:2]:
                raise ValueError(
                    f"extra latents of (B, C) = {tuple(segment.latents.shape[:2])} must be of the "
                    f"samples and channels of the video, {tuple(latents.shape[:2])}"
                )
        patches = _join([patchify(piece.latents, self.patch_size) for piece in pieces], 1)
        device, (batch, num_tokens, _) = latents.device, patches.shape
        starts = [piece.start / self.patch_size[0] for piece in pieces]
        rope = [self.rope(grid, device, start) for grid, start in zip(grids, starts, strict=True)]
        rows = level_index
        if extra:
            video = math.prod(grids[0])
            if rows is None:
                rows = torch.zeros(batch, video, dtype=torch.int64, device=device)
            rows = F.pad(rows, (0, num_tokens - video), value=num_levels - 1)
        if rows is not None:
            rows = rows + num_levels * torch.arange(batch, device=device)[:, None]
        return TokenSequence(patches, _join(rope, 0), rows, (grids[0],), (num_tokens,))

    def pack(
        self, videos: Sequence[Video], num_levels: int, budget: int | None = None
    ) -> TokenSequence:
        """The videos in one row, which is padded to `budget` tokens.

        Raises:
            ValueError: as for a batch, or there are more tokens than `budget`.
        """
        parts, rows = [], []
        for number, video in enumerate(videos):
            index = None if video.level_index is None else video.level_index[None]
            extra = [replace(s, latents=s.latents[None]) for s in video.extra]
            part = self.batch(video.latents[None], num_levels, index, extra)
            local = part.patches.new_zeros(part.patches.shape[:2], dtype=torch.int64)
            rows.append((local if part.rows is None else part.rows) + number * num_levels)
            parts.append(part)
        lengths = tuple(part.lengths[0] for part in parts)
        num_pads = 0 if budget is None else budget - sum(lengths)
        if num_pads < 0:
            raise ValueError(f"a pack of {sum(lengths)} tokens is over its budget={budget}")
        spare = parts[-1].rope[-1:].expand(num_pads, -1, -1)
        return TokenSequence(
            F.pad(torch.cat([part.patches for part in parts], 1), (0, 0, 0, num_pads)),
            torch.cat([*(part.rope for part in parts), spare]),
            F.pad(torch.cat(rows, 1), (0, num_pads)),
            tuple(part.grids[0] for part in parts),
            lengths,
        )

    def videos(self, x: Tensor, sequence: TokenSequence) -> list[Tensor]:
        """Predictions (B, N, C·pt·ph·pw) → the videos' (B, C, T, H, W), one for each grid."""
        parts = [x]
        if len(sequence.grids) > 1 or sequence.num_pads:
            parts = list(x.split((*sequence.lengths, sequence.num_pads), 1))[:-1]
        sizes = [math.prod(grid) for grid in sequence.grids]
        return [
            unpatchify(part if part.shape[1] == size else part[:, :size], self.patch_size, grid)
            for part, size, grid in zip(parts, sizes, sequence.grids, strict=True)
        ]


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    """torch.cat that does not copy a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
