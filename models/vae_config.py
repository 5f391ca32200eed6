"""Sizes of the video VAE, and the rules that they and its clips keep."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE.

    One entry of `dim_mult` per resolution; `temporal_downsample` says for each step between two of
    them whether it also halves time. The first layer sees squares of p = `patch_size` pixels, so
    strides are `(2^(temporal steps), p·2^steps, p·2^steps)`. `residual` lays shortcuts that average
    or repeat values around the steps (Wan 2.2). With `checkpoint_blocks` training computes each
    block twice and keeps only what lies between blocks.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    temporal_downsample: tuple[bool, ...]
    num_res_blocks: int
    decoder_base_dim: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    residual: bool = False
    patch_size: int = 1
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim_mult", tuple(self.dim_mult))
        object.__setattr__(self, "temporal_downsample", tuple(self.temporal_downsample))
        sizes = ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels", "patch_size")
        for name in sizes:
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
        if self.residual:
            self._check_shortcuts()
        elif any(dim % 2 for dim in self.decoder_dims[:-1]):
            raise ValueError(
                f"vae.dim_mult={self.dim_mult} times the decoder width {self.decoder_dim} "
                "must be even: each upsampling halves the channels"
            )

    def _check_shortcuts(self) -> None:
        """The shortcuts of the residual generation average or repeat equal groups of values."""
        down, up = self.encoder_dims, self.decoder_dims
        cells = [8 if temporal else 4 for temporal in self.temporal_downsample]  # values in a cell
        befores = (self.base_dim, *down[:-1])
        groups = [(n * c, to) for n, to, c in zip(befores, down, (*cells, 1), strict=True)]
        befores = (up[0], *up)[: len(cells)]
        groups += [(to * c, n) for n, to, c in zip(befores, up[:-1], cells[::-1], strict=True)]
        for whole, part in groups:
            if whole % part:
                raise ValueError(
                    f"vae.dim_mult={self.dim_mult} with vae.residual=true: {whole} values do not "
                    f"make {part} equal groups; let neighbours divide each other"
                )

    @property
    def decoder_dim(self) -> int:
        """Channels of the decoder's last resolution, `base_dim` unless set."""
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @property
    def encoder_dims(self) -> tuple[int, ...]:
        """Channels of each resolution, from pixels to latents."""
        return tuple(self.base_dim * mult for mult in self.dim_mult)

    @property
    def decoder_dims(self) -> tuple[int, ...]:
        """Channels of each resolution, from latents to pixels."""
        return tuple(self.decoder_dim * mult for mult in reversed(self.dim_mult))

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent in (time, height, width)."""
        space = 2 ** (len(self.dim_mult) - 1) * self.patch_size
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
