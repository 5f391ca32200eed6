"""Building blocks of the causal video VAE, all in one pass over the clip.

Layout (B, C, T, H, W) throughout, kept in channels-last memory: convolutions then run without
reordering, norms reduce over contiguous channels, and merging frames into the batch costs nothing.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.models import fused
from longtake.models.attention import attention

# aten sends fp32 convolutions of one sample with N·C·T·H at or below this to slow_conv3d, which is
# 6 to 18 times slower than oneDNN.
SLOW_CONV_LIMIT = 20480


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees no later frame: zeros stand for the frames before the first.

    (B, C, T, H, W) → (B, C', T', H, W); T' = T at stride 1. `history=False` leaves the zeros out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int] = (3, 3, 3),
        *,
        time_stride: int = 1,
        history: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=(time_stride, 1, 1))
        self.history = kernel_size[0] - 1 if history else 0
        self.space = (kernel_size[1] // 2, kernel_size[2] // 2)

    def forward(self, x: Tensor) -> Tensor:
        taps, stride = self.kernel_size[0], self.stride[0]
        frames = (x.shape[2] + self.history - taps) // stride + 1
        if frames == 1:  # the zeros in front add nothing: a 2-D convolution over the real frames
            return self._one_frame(x[:, :, : taps - self.history])
        if self.history:
            x = F.pad(x, (0, 0, 0, 0, self.history, 0))
        if not self._is_slow(x):
            return F.conv3d(x, self.weight, self.bias, self.stride, (0, *self.space))
        half = (frames + 1) // 2  # two overlapping halves as a batch of two
        span = stride * (half - 1) + taps
        start = stride * (frames - half)
        x = torch.cat((x[:, :, :span], x[:, :, start : start + span]))
        y = F.conv3d(x, self.weight, self.bias, self.stride, (0, *self.space))
        return torch.cat((y[:1], y[1:, :, 2 * half - frames :]), dim=2)

    def _one_frame(self, x: Tensor) -> Tensor:
        weight = self.weight[:, :, -x.shape[2] :].flatten(1, 2)
        y = F.conv2d(x.flatten(1, 2), weight, self.bias, padding=self.space)
        return y.unsqueeze(2)  # (B, C', 1, H, W)

    def _is_slow(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[0] != 1:
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        return x.shape[:4].numel() <= SLOW_CONV_LIMIT


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


class ResidualBlock(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.shortcut(x) + h


class FrameAttention(nn.Module):
    """Single-head self-attention inside each frame. (B, C, T, H, W) → same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        h = self.norm(x).permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, -1, channels)
        q, k, v = self.qkv(h).chunk(3, dim=-1)  # each (B·T, 1, H·W, C)
        h = self.proj(attention(q, k, v))
        h = h.view(batch, frames, height, width, channels)
        return x + h.permute(0, 4, 1, 2, 3)


class Downsample(nn.Module):
    """Halve height and width, and with `temporal` also the frames after the first.

    (B, C, 1 + n, H, W) → (B, C, 1 + n/2, H/2, W/2). In time y₀ = x₀ and
    y_j = conv(x_{2j−2}, x_{2j−1}, x_{2j}); a single frame skips that convolution.
    """

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels, 3, stride=2)
        self.time = None
        if temporal:
            self.time = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2, history=False)

    def forward(self, x: Tensor) -> Tensor:
        x = over_frames(lambda frame: self.space(F.pad(frame, (0, 1, 0, 1))), x)
        if self.time is None or x.shape[2] == 1:
            return x
        return torch.cat((x[:, :, :1], self.time(x)), dim=2)


class Upsample(nn.Module):
    """Double height and width, and with `temporal` also the frames after the first.

    (B, C, 1 + n, H, W) → (B, C', 1 + 2n, 2H, 2W). Frame 0 passes the time convolution by and is
    no part of its history.
    """

    def __init__(self, channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        if self.time is not None and x.shape[2] > 1:
            pairs = self.time(x[:, :, 1:]).unflatten(1, (2, -1))  # (B, 2, C, n, H, W)
            pairs = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # (B, C, 2n, H, W)
            x = torch.cat((x[:, :, :1], pairs), dim=2)
        return over_frames(lambda frame: self.space(double(frame)), x)


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by two: (N, C, H, W) → (N, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode="nearest-exact")


def over_frames(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a 2-D function to every frame: (B, C, T, H, W) → (B, C', T, H', W')."""
    batch = x.shape[0]
    frames = x.transpose(1, 2).flatten(0, 1)  # (B·T, C, H, W), a view in channels-last memory
    return function(frames).unflatten(0, (batch, -1)).transpose(1, 2)
