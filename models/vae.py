"""Causal 3-D KL VAE for video: 1 + st·k frames to latents and back, in one pass.

For equal sizes and weights it computes the function of diffusers' `AutoencoderKLWan` (Wan 2.1
generation, arXiv 2503.20314 §4.1), which walks the clip in chunks with a cache. Layout
(B, C, T, H, W) for pixels in [-1, 1] and latents. An image is a clip of one frame.
"""

import ctypes
import hashlib
import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from longtake.models.vae_blocks import (
    CausalConv3d,
    ChannelNormSilu,
    Downsample,
    FrameAttention,
    ResidualBlock,
    Upsample,
)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE.

    One entry of `dim_mult` per resolution; `temporal_downsample` says for each step between two of
    them whether it also halves time. Strides: `(2^(temporal steps), 2^steps, 2^steps)`.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    temporal_downsample: tuple[bool, ...]
    num_res_blocks: int
    decoder_base_dim: int | None = None
    in_channels: int = 3
    out_channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim_mult", tuple(self.dim_mult))
        object.__setattr__(self, "temporal_downsample", tuple(self.temporal_downsample))
        for name in ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae.{name}={getattr(self, name)} must be at least 1")
        if not self.dim_mult or min(self.dim_mult) < 1:
            raise ValueError(
                f"vae.dim_mult={self.dim_mult} needs one positive entry per resolution"
            )
        steps = len(self.dim_mult) - 1
        if len(self.temporal_downsample) != steps:
            raise ValueError(
                f"vae.temporal_downsample={self.temporal_downsample} must have {steps} entries, "
                f"one less than vae.dim_mult={self.dim_mult}"
            )
        if sum(self.temporal_downsample) > 2:
            raise ValueError(
                f"vae.temporal_downsample={self.temporal_downsample} may halve time at most twice: "
                "stock pipelines decode no other VAE; set one entry to false"
            )
        for mult in self.dim_mult[1:]:
            if mult * self.decoder_dim % 2:
                raise ValueError(
                    f"vae.dim_mult={self.dim_mult} times the decoder width {self.decoder_dim} "
                    "must be even: each upsampling halves the channels"
                )

    @property
    def decoder_dim(self) -> int:
        """Channels of the decoder's last resolution, `base_dim` unless set."""
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent in (time, height, width)."""
        space = 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), space, space

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (T, H, W) of a clip. ValueError where the strides do not divide it."""
        time, space, _ = self.strides
        if frames < 1 or (frames - 1) % time:
            raise ValueError(
                f"clip of {frames} frames: the VAE needs 1 + {time}·k; "
                f"use {max(frames - 1, 0) // time * time + 1}"
            )
        if height < space or width < space or height % space or width % space:
            raise ValueError(f"clip of {height}x{width} pixels: both must be multiples of {space}")
        return 1 + (frames - 1) // time, height // space, width // space


@dataclass(frozen=True)
class Posterior:
    """Diagonal normal over latents; mean and logvar (B, Z, T, H, W) in fp32."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std·noise for standard normal `noise` of the same shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL to the standard normal in nats, summed over each sample's latents: (B,)."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class EncoderStage(nn.Module):
    """The blocks of one resolution, then the step to the next."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, temporal: bool | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(width, out_channels) for width in widths)
        self.down = None if temporal is None else Downsample(out_channels, temporal=temporal)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.down is None else self.down(x)


class DecoderStage(nn.Module):
    """The blocks of one resolution, then the step to the next, which halves the channels."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, temporal: bool | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(width, out_channels) for width in widths)
        self.up = None
        if temporal is not None:
            self.up = Upsample(out_channels, out_channels // 2, temporal=temporal)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.up is None else self.up(x)


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels),
        FrameAttention(channels),
        ResidualBlock(channels, channels),
    )


class Encoder(nn.Module):
    """Pixels (B, C, T, H, W) → moments before the last 1×1×1 convolution (B, 2Z, T', H', W')."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * mult for mult in config.dim_mult]
        steps = (*config.temporal_downsample, None)
        self.conv_in = CausalConv3d(config.in_channels, config.base_dim)
        self.stages = nn.Sequential(
            *(
                EncoderStage(before, after, config.num_res_blocks, step)
                for before, after, step in zip(
                    [config.base_dim, *dims[:-1]], dims, steps, strict=True
                )
            )
        )
        self.middle = _middle(dims[-1])
        self.norm_out = ChannelNormSilu(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.stages(self.conv_in(x)))
        return self.conv_out(self.norm_out(x))


class Decoder(nn.Module):
    """Latents after the first 1×1×1 convolution (B, Z, T', H', W') → pixels (B, C, T, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.decoder_dim * mult for mult in reversed(config.dim_mult)]
        steps = (*reversed(config.temporal_downsample), None)
        befores = [dims[0], *(dim // 2 for dim in dims[:-1])]
        self.conv_in = CausalConv3d(config.z_dim, dims[0])
        self.middle = _middle(dims[0])
        self.stages = nn.Sequential(
            *(
                DecoderStage(before, after, config.num_res_blocks + 1, step)
                for before, after, step in zip(befores, dims, steps, strict=True)
            )
        )
        self.norm_out = ChannelNormSilu(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.stages(self.middle(self.conv_in(z)))
        return self.conv_out(self.norm_out(x))


class VAE(nn.Module):
    """Video VAE; see the module's docstring. `encode` and `decode` are differentiable."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self.init_weights()

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent in (time, height, width)."""
        return self.config.strides

    def encode(self, x: Tensor) -> Posterior:
        """Pixels (B, C, T, H, W) in [-1, 1], T = 1 + st·k → posterior over (B, Z, T', H', W').

        Raises ValueError for a channel count, frame count or size that the VAE cannot take.
        """
        if x.dim() != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"video of shape {tuple(x.shape)}: expected (B, {self.config.in_channels}, T, H, W)"
            )
        self.config.latent_shape(*x.shape[2:])
        x = x.contiguous(memory_format=torch.channels_last_3d)
        mean, logvar = self.quant(self.encoder(x)).float().contiguous().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, Z, T', H', W') → pixels (B, C, T, H, W), fp32, not clamped."""
        if z.dim() != 5 or z.shape[1] != self.config.z_dim:
            raise ValueError(
                f"latents of shape {tuple(z.shape)}: expected (B, {self.config.z_dim}, T, H, W)"
            )
        z = z.contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(self.post_quant(z)).float().contiguous()

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """Reconstruct x from a posterior sample drawn with `noise`: (pixels, posterior)."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior

    @torch.no_grad()
    def init_weights(self) -> None:
        """From-scratch start: attention silent, time steps copy, little latent noise.

        Convolutions keep torch's Kaiming-uniform start (arXiv 1502.01852); silent residual
        branches learned slower: 1.7 dB behind after 300 steps on small clips.
        """
        for module in self.modules():
            if isinstance(module, FrameAttention):
                nn.init.zeros_(module.proj.weight)
                nn.init.zeros_(module.proj.bias)
            elif isinstance(module, Upsample | Downsample) and module.time is not None:
                _init_time(module.time)
        nn.init.zeros_(self.quant.weight[self.config.z_dim :])
        nn.init.constant_(_bias(self.quant)[self.config.z_dim :], -6.0)


def _bias(conv: nn.Conv3d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _init_time(conv: CausalConv3d) -> None:
    """Downsampling averages the two new frames of a pair, upsampling repeats each frame."""
    eye = torch.eye(conv.in_channels).to(conv.weight)
    nn.init.zeros_(_bias(conv))
    nn.init.zeros_(conv.weight)
    if conv.stride[0] == 2:
        conv.weight[:, :, 1:, 0, 0] = 0.5 * eye[..., None]
    else:
        conv.weight[:, :, -1, 0, 0] = torch.cat((eye, eye))


def vae_hash(state_dict: dict[str, Tensor], config: VAEConfig) -> str:
    """Hex SHA-256 over the config and every weight: the identity of a latent space."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        size = tensor.numel() * tensor.element_size()
        digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
    return digest.hexdigest()
