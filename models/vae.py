"""Causal 3-D KL VAE for video: 1 + st·k frames to latents and back, in one pass.

For equal sizes and weights it computes the function of diffusers' `AutoencoderKLWan`, which walks
the clip in chunks with a cache, in the generations of Wan 2.1 (arXiv 2503.20314 §4.1) and 2.2.
Layout (B, C, T, H, W) for pixels in [-1, 1] and latents. An image is a clip of one frame.
`longtake.models.vae_streaming` takes clips of any length and size.
"""

import ctypes
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longtake.models.vae_blocks import (
    AverageDown,
    Block,
    ChannelNormSilu,
    Downsample,
    DuplicateUp,
    FrameAttention,
    ResidualBlock,
    Upsample,
    head_frames,
    pack_pixels,
    unpack_pixels,
)
from longtake.models.vae_config import VAEConfig
from longtake.models.vae_conv import CausalConv3d, Stream


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
    """The blocks of one resolution, then the step to the next; temporal=None: no step."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        temporal: bool | None,
        residual: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(width, out_channels) for width in widths)
        self.down = None if temporal is None else Downsample(out_channels, temporal=temporal)
        self.shortcut = None
        if residual:
            space = 1 if temporal is None else 2
            self.shortcut = AverageDown(out_channels, 2 if temporal else 1, space)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        h = x
        for block in self.blocks:
            h = block(h, stream)
        if self.down is not None:
            h = self.down(h, stream)
        return h if self.shortcut is None else h + self.shortcut(x)


class DecoderStage(nn.Module):
    """The blocks of one resolution, then the step to the next; temporal=None: no step.

    The step halves the channels, but not in the residual generation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        temporal: bool | None,
        residual: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(width, out_channels) for width in widths)
        self.up = self.shortcut = None
        if temporal is not None:
            after = out_channels if residual else out_channels // 2
            self.up = Upsample(out_channels, after, temporal=temporal)
            if residual:
                self.shortcut = DuplicateUp(out_channels, 2 if temporal else 1, 2)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        h = x
        for block in self.blocks:
            h = block(h, stream)
        if self.up is not None:
            h = self.up(h, stream)
        return h if self.shortcut is None else h + self.shortcut(x, stream)


class Middle(nn.Sequential):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            ResidualBlock(channels, channels),
            FrameAttention(channels),
            ResidualBlock(channels, channels),
        )

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        for block in self:
            x = block(x, stream)
        return x


class Encoder(nn.Module):
    """Pixels (B, C, T, H, W) → moments before the last 1×1×1 convolution (B, 2Z, T', H', W')."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = config.encoder_dims
        befores = (config.base_dim, *dims[:-1])
        steps = (*config.temporal_downsample, None)
        self.patch_size = config.patch_size
        self.conv_in = CausalConv3d(config.in_channels * config.patch_size**2, config.base_dim)
        self.stages = nn.ModuleList(
            EncoderStage(n, to, config.num_res_blocks, temporal=step, residual=config.residual)
            for n, to, step in zip(befores, dims, steps, strict=True)
        )
        self.middle = Middle(dims[-1])
        self.norm_out = ChannelNormSilu(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = self.conv_in(pack_pixels(x, self.patch_size), stream)
        for stage in self.stages:
            x = stage(x, stream)
        x = self.middle(x, stream)
        return self.conv_out(self.norm_out(x), stream)


class Decoder(nn.Module):
    """Latents after the first 1×1×1 convolution (B, Z, T', H', W') → pixels (B, C, T, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = config.decoder_dims
        befores = (dims[0], *(dim if config.residual else dim // 2 for dim in dims[:-1]))
        steps = (*reversed(config.temporal_downsample), None)
        self.patch_size = config.patch_size
        self.conv_in = CausalConv3d(config.z_dim, dims[0])
        self.middle = Middle(dims[0])
        self.stages = nn.ModuleList(
            DecoderStage(n, to, config.num_res_blocks + 1, temporal=step, residual=config.residual)
            for n, to, step in zip(befores, dims, steps, strict=True)
        )
        self.norm_out = ChannelNormSilu(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.out_channels * config.patch_size**2)

    def forward(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        x = self.middle(self.conv_in(z, stream), stream)
        for stage in self.stages:
            x = stage(x, stream)
        return unpack_pixels(self.conv_out(self.norm_out(x), stream), self.patch_size)


def check_layout(x: Tensor, channels: int, what: str) -> None:
    """ValueError unless x is (B, channels, T, H, W), none of them zero."""
    if x.dim() != 5 or x.shape[1] != channels or not x.numel():
        raise ValueError(f"{what} of shape {tuple(x.shape)}: expected (B, {channels}, T, H, W)")


def check_finite(x: Tensor, what: str, first_frame: int = 0) -> None:
    """ValueError unless all of x (B, C, T, H, W) is finite; waits for the device."""
    finite = x.isfinite().transpose(1, 2).flatten(2).all(2)  # (B, T)
    if not finite.all():
        sample, frame = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{what}: sample {sample} has values that are not finite in frame "
            f"{first_frame + frame}, and all must be: decode or normalise it again"
        )


class VAE(nn.Module):
    """Video VAE; see the module's docstring. `encode` and `decode` are differentiable, and take any
    dtype, whatever that of the weights (those of inference may be all bf16).

    They do not look whether values are finite, which would wait for the device in each step of a
    training; `longtake.models.vae_bounded` and `vae_streaming` do.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = config.checkpoint_blocks
        self.init_weights()

    def compile_parts(self, **options: Any) -> None:
        """torch.compile encoder and decoder, a graph for each shape; names of weights stay.

        torch computes plainly, with a warning, what is beyond its limit of graphs, which is raised
        here: every bucket has one.
        """
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 64)
        for part in (self.encoder, self.decoder):
            part.compile(dynamic=False, **options)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent in (time, height, width)."""
        return self.config.strides

    def encode(self, x: Tensor, stream: Stream | None = None) -> Posterior:
        """Pixels (B, C, T, H, W) in [-1, 1], T = 1 + st·k → posterior over (B, Z, T', H', W').

        With `stream`, x goes on where the last chunk ended, and T = st·k after the first. Raises
        ValueError for a channel count, frame count or size that the VAE cannot take.
        """
        check_layout(x, self.config.in_channels, "video")
        frames = x.shape[2]
        if not head_frames(stream):
            stride = self.strides[0]
            if frames % stride:
                raise ValueError(f"chunk of {frames} frames: after the first, {stride}·k is needed")
            frames += 1
        self.config.latent_shape(frames, *x.shape[3:])
        x = x.to(self.encoder.conv_in.weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        moments = self.quant(self.encoder(x, stream)).float().contiguous()
        if stream is not None:
            stream.is_started = True
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        """Latents (B, Z, T', H', W') → pixels (B, C, T, H, W), fp32, not clamped.

        With `stream`, z goes on where the last chunk ended: any number of frames.
        """
        check_layout(z, self.config.z_dim, "latents")
        z = z.to(self.post_quant.weight.dtype)
        z = z.contiguous(memory_format=torch.channels_last_3d)
        pixels = self.decoder(self.post_quant(z), stream).float().contiguous()
        if stream is not None:
            stream.is_started = True
        return pixels

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
    """Hex SHA-256 of what makes the latents: the encoder's weights and config.

    Latents stay those of a VAE whose decoder is trained on.
    """
    sizes = asdict(config)
    for name in ("checkpoint_blocks", "decoder_base_dim", "out_channels"):
        del sizes[name]
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for name in sorted(name for name in state_dict if name.startswith(("encoder.", "quant."))):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        size = tensor.numel() * tensor.element_size()
        digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
    return digest.hexdigest()
