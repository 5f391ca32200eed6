"""Layers of the diffusion transformer: time, rotary positions, patches, MLP.

Layout of tokens (B, N, D).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.models.fused import GeluTanh


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000·t: (...,) in [0, 1] → (..., dim), cosines first, periods up to 10⁴·2π.

    Vaswani et al. (arXiv 1706.03762 §3.5) with the half-and-half order of DDPM code bases.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = 1000.0 * t.float()[..., None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class MLP(nn.Module):
    """Linear → activation → linear. (..., in_dim) → (..., out_dim)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(F.silu(h) if self.activation == "silu" else gelu_tanh(h))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form (arXiv 1606.08415 §2)."""
    if x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled():
        return GeluTanh.apply(x)
    return F.gelu(x, approximate="tanh")


class RotaryTable:
    """Rotary angles of a (T, H, W) token grid; RoPE (arXiv 2104.09864) split over three axes.

    Of the Dh/2 frequency pairs of a head, Dh//6 each go to height and width, the rest to time.
    Holds no weights; tables of the grids seen are kept.
    """

    def __init__(self, num_heads: int, head_dim: int, theta: float = 10000.0) -> None:
        space = 2 * (head_dim // 6)
        self.num_heads = num_heads
        self.dims = (head_dim - 2 * space, space, space)
        self.theta = theta
        self.cache: dict[tuple[tuple[int, int, int], float, torch.device], Tensor] = {}

    def __call__(
        self, grid: tuple[int, int, int], device: torch.device, start: float = 0.0
    ) -> Tensor:
        """exp(i·angle) (N, H, Dh/2), complex64, for tokens in (T, H, W) order, T from `start`."""
        key = (grid, start, device)
        if key not in self.cache:
            axes = torch.meshgrid(
                *(
                    torch.arange(size, dtype=torch.float64) + first
                    for size, first in zip(grid, (start, 0, 0), strict=True)
                ),
                indexing="ij",
            )
            angles = torch.cat(
                [
                    axis.reshape(-1, 1) * self.theta ** (-torch.arange(0, dim, 2).double() / dim)
                    for axis, dim in zip(axes, self.dims, strict=True)
                ],
                dim=1,
            )  # (N, Dh/2)
            if len(self.cache) >= 64:  # buckets are few; random sizes must not pile up
                self.cache.pop(next(iter(self.cache)))
            turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(device)
            # A table that broadcasts over heads is half as fast on a CPU.
            turns = turns[:, None].expand(-1, self.num_heads, -1)
            self.cache[key] = turns.contiguous() if device.type == "cpu" else turns
        return self.cache[key]


def token_grid(shape: Sequence[int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Token grid of latents (T, H, W). ValueError where the patch does not divide them."""
    if any(size % step for size, step in zip(shape, patch, strict=True)):
        raise ValueError(
            f"latents of (T, H, W) = {tuple(shape)} must be divisible by model.patch_size={patch}"
        )
    frames, height, width = (size // step for size, step in zip(shape, patch, strict=True))
    return frames, height, width


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) → (B, N, C·pt·ph·pw), tokens in (T, H, W) order."""
    batch, channels, frames, height, width = x.shape
    pt, ph, pw = patch
    x = x.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * pt * ph * pw)


def unpatchify(x: Tensor, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """(B, N, pt·ph·pw·C) → (B, C, T, H, W): the channel comes last inside a token here."""
    batch = x.shape[0]
    (frames, height, width), (pt, ph, pw) = grid, patch
    x = x.reshape(batch, frames, height, width, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, -1, frames * pt, height * ph, width * pw)
