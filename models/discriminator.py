"""A critic of video patches: the 3-D PatchGAN discriminator of the VAE's adversarial loss.

Convolutions of stride two judge overlapping patches instead of whole clips (PatchGAN, arXiv
1611.07004 §3.2.2). Normalisation is by groups inside a sample, so that a verdict does not depend on
the other samples of the batch.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.models.vae_conv import is_bf16_on_cpu

SLOPE = 0.2  # of the leaky ReLU, as in PatchGAN
MAX_MULT = 8  # width of the deepest layers, in base widths


@dataclass(frozen=True)
class DiscriminatorConfig:
    """`num_layers` convolutions of stride 2, of which the first leaves time as it is."""

    base_dim: int
    num_layers: int
    in_channels: int = 3

    def __post_init__(self) -> None:
        if self.base_dim < 8 or self.base_dim % 8:
            raise ValueError(
                f"base_dim={self.base_dim} must be a multiple of 8, the channels of a norm's group"
            )
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers} must be at least 1")

    @property
    def stride(self) -> int:
        """Pixels of height and width per verdict."""
        return 2**self.num_layers

    def check_size(self, height: int, width: int) -> None:
        """ValueError for frames of less than one patch."""
        if min(height, width) < self.stride:
            raise ValueError(
                f"frames of {height}x{width}: discriminator.num_layers={self.num_layers} halves "
                f"them to nothing; they need {self.stride} pixels, or use fewer layers"
            )


class ClipConv3d(nn.Conv3d):
    """3-D convolution that is right in bf16 on a CPU, too: there it is a 2-D one of frames, with
    the frames that each of them sees as its channels.

    oneDNN's own of clips is not, with AMX: the output of a single frame of 3 channels, and weight
    gradients where frames are few or have more than 1024 positions; it may write past its memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.by_frames(x) if is_bf16_on_cpu(x) else super().forward(x)

    def by_frames(self, x: Tensor) -> Tensor:
        """The same function of (B, C, T, H, W), by operations with derivatives of any order."""
        assert not isinstance(self.padding, str)
        (taps, *_), (step, *strides), (rim, *rims) = self.kernel_size, self.stride, self.padding
        x = F.pad(x, (0, 0, 0, 0, rim, rim)).movedim(1, -1)  # (B, T, H, W, C)
        last = x.shape[1] - taps + 1
        seen = torch.cat([x[:, tap : tap + last : step] for tap in range(taps)], dim=-1)
        frames = seen.flatten(0, 1).movedim(-1, 1)  # (B·T', taps·C, H, W) in channels-last memory
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        y = F.conv2d(frames, weight, self.bias, strides, rims)
        return y.unflatten(0, seen.shape[:2]).transpose(1, 2)  # (B, C', T', H', W')


class Discriminator(nn.Module):
    """Video (B, C, T, H, W) → one logit per patch, (B, 1, T', H', W'); images are T = 1."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        mults = [min(2**index, MAX_MULT) for index in range(config.num_layers)]
        widths = [config.base_dim * mult for mult in mults]
        self.conv_in = ClipConv3d(
            config.in_channels, widths[0], (3, 4, 4), stride=(1, 2, 2), padding=(1, 1, 1)
        )
        self.layers = nn.ModuleList(
            nn.Sequential(
                ClipConv3d(before, after, (3, 4, 4), stride=2, padding=1, bias=False),
                nn.GroupNorm(after // 8, after),
            )
            for before, after in itertools.pairwise(widths)
        )
        self.conv_out = ClipConv3d(widths[-1], 1, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(video), SLOPE)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
        return self.conv_out(x).float()
