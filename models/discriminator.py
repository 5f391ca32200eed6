"""A critic of video patches: the 3-D PatchGAN discriminator of the VAE's adversarial loss.

Convolutions of stride two judge overlapping patches instead of whole clips (PatchGAN, arXiv
1611.07004 §3.2.2). Normalisation is by groups inside a sample, so that a verdict does not depend on
the other samples of the batch.
"""

import itertools
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

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


class Discriminator(nn.Module):
    """Video (B, C, T, H, W) → one logit per patch, (B, 1, T', H', W'); images are T = 1."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        mults = [min(2**index, MAX_MULT) for index in range(config.num_layers)]
        widths = [config.base_dim * mult for mult in mults]
        self.conv_in = nn.Conv3d(
            config.in_channels, widths[0], (3, 4, 4), stride=(1, 2, 2), padding=(1, 1, 1)
        )
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(before, after, (3, 4, 4), stride=2, padding=1, bias=False),
                nn.GroupNorm(after // 8, after),
            )
            for before, after in itertools.pairwise(widths)
        )
        self.conv_out = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(video), SLOPE)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
        return self.conv_out(x).float()
