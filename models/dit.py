"""Diffusion transformer over spacetime latent patches.

For equal sizes and weights it computes the function of diffusers' `WanTransformer3DModel`
(Wan 2.1, arXiv 2503.20314 §4.2): 3-D RoPE, one adaLN projection shared by all blocks plus a table
per block, RMS-normed queries and keys, cross-attention to text. Shapes: B batch, C channels,
T H W latent frames, height, width, N = (T/pt)·(H/ph)·(W/pw) tokens, L text tokens, D hidden,
K noise levels in one sample.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.models.attention import attention
from longtake.models.fused import GatedAdd, ModulatedNorm, NormRotateHeads
from longtake.models.layers import MLP, RotaryTable, patchify, timestep_embedding, unpatchify


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer; `text_dim` is the width of the text embeddings it is given."""

    in_channels: int
    out_channels: int
    hidden_size: int
    num_heads: int
    depth: int
    ffn_dim: int
    text_dim: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        for name in ("in_channels", "out_channels", "hidden_size", "num_heads", "depth", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"model.patch_size={self.patch_size} must be three positive integers")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be divisible by "
                f"model.num_heads={self.num_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"model.hidden_size / model.num_heads = {self.head_dim} must be even and at least "
                "6, so that rotary pairs cover time, height and width"
            )
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise ValueError(f"model.freq_dim={self.freq_dim} must be even")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Token grid of latents (T, H, W). ValueError where the patch does not divide them."""
        if any(size % patch for size, patch in zip(shape, self.patch_size, strict=True)):
            raise ValueError(
                f"latents of (T, H, W) = {tuple(shape)} must be divisible by "
                f"model.patch_size={self.patch_size}"
            )
        frames, height, width = (s // p for s, p in zip(shape, self.patch_size, strict=True))
        return frames, height, width


@dataclass(frozen=True)
class TextTokens:
    """Projected text (B, L', D) whose last row stands for `num_pads` equal padding rows."""

    tokens: Tensor
    num_pads: int


class SelfAttention(nn.Module):
    """Multi-head attention over the video tokens. (B, N, D) → same."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads, self.eps = config.num_heads, config.eps
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = nn.Parameter(torch.ones(dim))
        self.norm_k = nn.Parameter(torch.ones(dim))
        self.proj = nn.Linear(dim, dim)

    def init_places(self) -> None:
        """Start with preferences for places, whatever the content, which in noise says nothing.

        Rotary positions make them of biases of queries and keys; a gain gives narrow heads the
        logits of 128 channels. Without the two the nano model's loss at t = 0.9 is .54 instead of
        .45 after 750 steps.
        """
        dim = self.proj.in_features
        nn.init.normal_(self.qkv.bias[: 2 * dim])
        for gain in (self.norm_q, self.norm_k):
            nn.init.constant_(gain, max(1.0, (128 * self.num_heads / dim) ** 0.5))

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        weight = torch.stack((self.norm_q, self.norm_k))
        q, k, v = NormRotateHeads.apply(self.qkv(x), weight, rope, self.num_heads, self.eps)
        h = attention(q, k, v)  # (B, H, N, Dh)
        return self.proj(h.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Video tokens (B, N, D) attend to the text, its padding included. → (B, N, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm_q = nn.Parameter(torch.ones(dim))
        self.norm_k = nn.Parameter(torch.ones(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: TextTokens) -> Tensor:
        (q,) = NormRotateHeads.apply(self.q(x), self.norm_q[None], None, self.num_heads, self.eps)
        k, v = NormRotateHeads.apply(
            self.kv(text.tokens), self.norm_k[None], None, self.num_heads, self.eps
        )  # (B, H, L', Dh)
        bias = None
        if text.num_pads > 1 and x.device.type == "cpu":  # one key of weight num_pads
            bias = k.new_zeros(k.shape[2])
            bias[-1] = math.log(text.num_pads)
        elif text.num_pads > 1:  # repeated keys need no mask, so flash kernels stay usable
            k, v = _repeat_last(k, text.num_pads), _repeat_last(v, text.num_pads)
        h = attention(q, k, v, key_bias=bias)
        return self.proj(h.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; the first and last are modulated and gated."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(6, dim))
        self.self_attn = SelfAttention(config)
        self.norm_cross = nn.LayerNorm(dim, config.eps) if config.cross_attn_norm else None
        self.cross_attn = CrossAttention(config)
        self.mlp = MLP(dim, config.ffn_dim, dim, "gelu_tanh")

    def forward(
        self,
        x: Tensor,
        text: TextTokens,
        modulation: Tensor,
        one_hot: Tensor | None,
        rope: Tensor,
    ) -> Tensor:
        """x (B, N, D), modulation (6, B, K, D) fp32, one_hot (B, N, K) or None → (B, N, D)."""
        table = self.modulation[:, None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation + table  # each (B, K, D)
        h = ModulatedNorm.apply(x, shift1, scale1, one_hot, self.eps)
        x = GatedAdd.apply(x, self.self_attn(h, rope), gate1, one_hot)
        h = x if self.norm_cross is None else self.norm_cross(x).to(x.dtype)
        x = x + self.cross_attn(h, text)
        h = ModulatedNorm.apply(x, shift2, scale2, one_hot, self.eps)
        return GatedAdd.apply(x, self.mlp(h), gate2, one_hot)


class DiT(nn.Module):
    """Predicts velocity (or the clean latents) for noisy latents; see the module's docstring."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch_volume = config.hidden_size, math.prod(config.patch_size)
        self.rope = RotaryTable(config.num_heads, config.head_dim)
        self.patch_embed = nn.Linear(config.in_channels * patch_volume, dim)
        self.time_embed = MLP(config.freq_dim, dim, dim, "silu")
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embed = MLP(config.text_dim, dim, dim, "gelu_tanh")
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.modulation = nn.Parameter(torch.zeros(2, dim))
        self.head = nn.Linear(dim, config.out_channels * patch_volume)
        self.init_weights()

    def forward(
        self,
        latents: Tensor,
        t: Tensor | None,
        text_embeds: Tensor,
        text_lens: Tensor | None = None,
        *,
        levels: Tensor | None = None,
        level_index: Tensor | None = None,
    ) -> Tensor:
        """latents (B, C, T, H, W), text_embeds (B, L, Dt) → prediction (B, C', T, H, W) in fp32.

        t (B,) in [0, 1] is each sample's noise level, 1 pure noise. With `levels` (B, K) and
        `level_index` (B, N) token n has level `levels[b, level_index[b, n]]` and t is not read.
        Rows of text_embeds from `text_lens[b]` on are zero padding that is attended to; they cost
        as much as one row. Keep text_lens (B,) on the CPU: its maximum is read on the host.
        Raises ValueError for shapes the patch size does not divide.
        """
        grid = self.config.grid(latents.shape[2:])
        if levels is None:
            if t is None:
                raise ValueError("DiT needs t (B,), or levels (B, K) with level_index (B, N)")
            levels, level_index = t[:, None], None
        one_hot = None
        if level_index is not None:
            one_hot = F.one_hot(level_index, levels.shape[1]).float()  # (B, N, K)
        rope = self.rope(grid, latents.device)
        time, modulation = self._modulation(levels)
        text = self._text(text_embeds, text_lens)
        x = self.patch_embed(patchify(latents, self.config.patch_size))  # (B, N, D)
        for block in self.blocks:
            x = block(x, text, modulation, one_hot, rope)
        shift, scale = time + self.modulation[:, None, None]  # each (B, K, D)
        x = self.head(ModulatedNorm.apply(x, shift, scale, one_hot, self.config.eps))
        return unpatchify(x.float(), self.config.patch_size, grid)

    def _modulation(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """levels (B, K) → time embedding (B, K, D) and its projection (6, B, K, D), fp32."""
        with torch.autocast(levels.device.type, enabled=False):
            time = self.time_embed(timestep_embedding(levels, self.config.freq_dim))  # (B, K, D)
            return time, self.time_proj(F.silu(time)).unflatten(-1, (6, -1)).movedim(2, 0)

    def _text(self, embeds: Tensor, lens: Tensor | None) -> TextTokens:
        """Project the text; of its padding only one row where that saves anything."""
        length, used = embeds.shape[1], embeds.shape[1]
        if lens is not None and lens.device.type == "cpu":
            used = int(lens.max())
        num_pads = length - used
        if num_pads > 1:
            embeds = embeds[:, : used + 1]
        return TextTokens(self.text_embed(embeds), max(num_pads, 1))

    @torch.no_grad()
    def init_weights(self) -> None:
        """From-scratch start: adaLN-zero and a zero head (DiT, arXiv 2212.09748 §3.2).

        Linear layers are Xavier-uniform with zero biases, the embedders too: the usual
        normal(0.02) starves small models of text and time (loss .48 against .36 after 250 steps).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.init_places()
        nn.init.zeros_(self.time_proj.weight)
        nn.init.zeros_(self.head.weight)


def _repeat_last(x: Tensor, times: int) -> Tensor:
    return torch.cat((x[:, :, :-1], x[:, :, -1:].expand(-1, -1, times, -1)), dim=2)
