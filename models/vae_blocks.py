"""Building blocks of the causal video VAE: a clip in one pass or, with a `Stream`, in chunks.

Layout (B, C, T, H, W) throughout, kept in channels-last memory: convolutions then run without
reordering, norms reduce over contiguous channels, and merging frames into the batch costs nothing.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longtake.models import fused
from longtake.models.attention import attention
from longtake.models.vae_conv import CausalConv3d, FrameConv2d, Stream


def head_frames(stream: Stream | None) -> int:
    """Frames of this pass that no change of frame rate touches: the clip's frame 0."""
    return 0 if stream is not None and stream.is_started else 1


class ChannelNorm(nn.Module):
    """x / ‖x‖ · √C · weight over the channels of each position, in fp32. (B, C, ...) → same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.gain = math.sqrt(channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.movedim(1, -1).float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        y = wide * (self.gain / length.clamp_min(1e-12)) * self.weight
        return y.to(x.dtype).movedim(-1, 1)


class ChannelNormSilu(ChannelNorm):
    """`ChannelNorm`, then SiLU. (B, C, ...) → same."""

    def forward(self, x: Tensor) -> Tensor:
        return fused.ChannelNormSilu.apply(x, self.weight)


class Block(nn.Module):
    """A module called with (x, stream).

    With `recompute` the backward pass computes the block again, and only its input is kept.
    """

    recompute = False

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        if self.recompute and stream is None and torch.is_grad_enabled():
            return checkpoint(self.compute, x, None, use_reentrant=False)
        return self.compute(x, stream)

    def compute(self, x: Tensor, stream: Stream | None) -> Tensor:
        """What the block does."""
        raise NotImplementedError


class ResidualBlock(Block):
    """norm → SiLU → causal conv, twice, around a shortcut. (B, C, T, H, W) → (B, C', T, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNormSilu(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = ChannelNormSilu(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else CausalConv3d(in_channels, out_channels, (1, 1, 1))
        )

    def compute(self, x: Tensor, stream: Stream | None) -> Tensor:
        h = self.conv1(self.norm1(x), stream)
        h = self.conv2(self.norm2(h), stream)
        return self.shortcut(x) + h


class FrameAttention(Block):
    """Single-head self-attention inside each frame. (B, C, T, H, W) → same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def compute(self, x: Tensor, stream: Stream | None) -> Tensor:
        batch, channels, frames, height, width = x.shape
        h = self.norm(x).permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, -1, channels)
        q, k, v = self.qkv(h).chunk(3, dim=-1)  # each (B·T, 1, H·W, C)
        h = self.proj(attention(q, k, v))
        h = h.view(batch, frames, height, width, channels)
        return x + h.permute(0, 4, 1, 2, 3)


class Downsample(Block):
    """Halve height and width, and with `temporal` also the frames after the first.

    (B, C, 1 + n, H, W) → (B, C, 1 + n/2, H/2, W/2). In time y₀ = x₀ and
    y_j = conv(x_{2j−2}, x_{2j−1}, x_{2j}); a single frame skips that convolution.
    """

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels, 3, stride=2)
        self.time = None
        if temporal:
            self.time = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2)

    def compute(self, x: Tensor, stream: Stream | None) -> Tensor:
        x = over_frames(lambda frame: self.space(F.pad(frame, (0, 1, 0, 1))), x)
        if self.time is None:
            return x
        head = x[:, :, : head_frames(stream)]
        if stream is not None:
            x = stream.join(self, x, 1)
        return head if x.shape[2] == 1 else torch.cat((head, self.time(x)), dim=2)


class Upsample(Block):
    """Double height and width, and with `temporal` also the frames after the first.

    (B, C, 1 + n, H, W) → (B, C', 1 + 2n, 2H, 2W). Frame 0 passes the time convolution by and is
    no part of its history.
    """

    def __init__(self, channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.space = FrameConv2d(channels, out_channels)
        self.time = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def compute(self, x: Tensor, stream: Stream | None) -> Tensor:
        head = head_frames(stream)
        if self.time is not None and x.shape[2] > head:
            pairs = self.time(x[:, :, head:], stream).unflatten(1, (2, -1))  # (B, 2, C, n, H, W)
            pairs = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # (B, C, 2n, H, W)
            x = torch.cat((x[:, :, :head], pairs), dim=2)
        return over_frames(lambda frame: self.space(double(frame)), x)


class AverageDown(nn.Module):
    """Shortcut around a step down: every output channel is the mean of a group of input values.

    (B, C, T, H, W) → (B, C', ⌈T/time⌉, H/space, W/space). The values of a time × space × space cell
    line up channel by channel and are averaged in C' equal groups. Where `time` does not divide T
    a zero frame comes first and counts in the mean.
    """

    def __init__(self, out_channels: int, time: int, space: int) -> None:
        super().__init__()
        self.out_channels, self.time, self.space = out_channels, time, space

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))
        x = x.unflatten(4, (-1, self.space)).unflatten(3, (-1, self.space))
        x = x.unflatten(2, (-1, self.time))  # (B, C, T', time, H', space, W', space)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (B, T', H', W', C·cell)
        return x.unflatten(4, (self.out_channels, -1)).mean(5).movedim(4, 1)


class DuplicateUp(nn.Module):
    """Shortcut around a step up, the reverse of `AverageDown`: values are repeated.

    (B, C, T, H, W) → (B, C', T·time − (time − 1), H·space, W·space): the copies of the clip's frame
    0 that would lie before it are dropped.
    """

    def __init__(self, out_channels: int, time: int, space: int) -> None:
        super().__init__()
        self.out_channels, self.time, self.space = out_channels, time, space

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        repeats = self.out_channels * self.time * self.space**2 // x.shape[1]
        x = x.movedim(1, 4).repeat_interleave(repeats, dim=4)
        x = x.unflatten(4, (self.out_channels, self.time, self.space, self.space))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, T, time, H, space, W, space, C')
        x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(4, 1)
        return x[:, :, head_frames(stream) * (self.time - 1) :]


def pack_pixels(x: Tensor, size: int) -> Tensor:
    """Squares of pixels become channels (c, column, row): (B, C, T, H, W) → (B, C·size², ...)."""
    x = x.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # (B, C, T, H', size, W', size)
    return x.permute(0, 2, 3, 5, 1, 6, 4).flatten(4).movedim(4, 1)


def unpack_pixels(x: Tensor, size: int) -> Tensor:
    """The inverse of `pack_pixels`."""
    x = x.unflatten(1, (-1, size, size))  # (B, C, column, row, T, H', W')
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by two: (N, C, H, W) → (N, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode="nearest-exact")


def over_frames(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a 2-D function to every frame: (B, C, T, H, W) → (B, C', T, H', W')."""
    batch = x.shape[0]
    frames = x.transpose(1, 2).flatten(0, 1)  # (B·T, C, H, W), a view in channels-last memory
    return function(frames).unflatten(0, (batch, -1)).transpose(1, 2)
