"""Layers of the diffusion transformer: norms, modulation, rotary positions, projections.

Layout of tokens (B, N, D). Norms and modulation compute in fp32 whatever the autocast dtype.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        h = F.silu(h) if self.activation == "silu" else F.gelu(h, approximate="tanh")
        return self.fc2(h)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension, result in fp32.

    Written out because `F.rms_norm` is several times slower than this on a CPU.
    """
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift; x (B, N, D), shift and scale (B, 1|N, D) → (B, N, D)."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gated_add(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate·branch with x, branch (B, N, D), gate (B, 1|N, D) → (B, N, D), dtype of x."""
    return torch.addcmul(x.float(), branch.float(), gate).to(x.dtype)


class RotaryTable(nn.Module):
    """Rotary angles of a (T, H, W) token grid; RoPE (arXiv 2104.09864) split over three axes.

    Of the Dh/2 frequency pairs of a head, Dh//6 each go to height and width, the rest to time.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        space = 2 * (head_dim // 6)
        self.dims = (head_dim - 2 * space, space, space)
        self.theta = theta
        self.cache: dict[tuple[tuple[int, int, int], torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine (N, Dh/2), fp32, for tokens in (T, H, W) order."""
        key = (grid, device)
        if key not in self.cache:
            axes = torch.meshgrid(
                *(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij"
            )
            angles = torch.cat(
                [
                    axis.reshape(-1, 1) * self.theta ** (-torch.arange(0, dim, 2).double() / dim)
                    for axis, dim in zip(axes, self.dims, strict=True)
                ],
                dim=1,
            )  # (N, Dh/2)
            if len(self.cache) > 64:  # buckets are few; random sizes must not pile up
                self.cache.clear()
            self.cache[key] = (
                angles.cos().float().to(device),
                angles.sin().float().to(device),
            )
        return self.cache[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel j of each head's first half with channel j of its second half.

    x (B, N, H, Dh), cos and sin (N, Dh/2) → same. Neighbouring pairs, as in most published
    weights, are the same function of permuted channels; contiguous halves are faster.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (N, 1, Dh/2)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


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
