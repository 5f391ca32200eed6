"""Diffusion transformer over spacetime latent patches.

For equal sizes and weights it computes the function of diffusers' `WanTransformer3DModel`
(Wan 2.1, arXiv 2503.20314 §4.2): 3-D RoPE, one adaLN projection shared by all blocks plus a table
per block, RMS-normed queries and keys, cross-attention to text. Shapes: B batch, C channels,
T H W latent frames, height, width, N = (T/pt)·(H/ph)·(W/pw) tokens, L text tokens, D hidden,
K noise levels in one sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from longtake.models.attention import Documents, attention
from longtake.models.fused import GatedAdd, ModulatedNorm, NormRotateHeads
from longtake.models.layers import MLP, timestep_embedding, token_grid
from longtake.models.tokens import Segment, Sequencer, TokenSequence, Video
from longtake.models.ulysses import SharedTokens

CHECKPOINTING = ("none", "selective", "full")
# What selective checkpointing keeps: the results that are dear to compute again. Not baddbmm and
# longtake::attend, by which a CPU writes attention out: they hold its weights, which are quadratic.
_KEEP_PRODUCTS = partial(
    create_selective_checkpoint_contexts,
    [
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    ],
)


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
    absolute_positions: float = 0.0  # their amplitude; Wan has none; see DiT.forward

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
        if self.absolute_positions < 0:
            raise ValueError(
                f"model.absolute_positions={self.absolute_positions} must be an amplitude; 0: none"
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
        return token_grid(shape, self.patch_size)


@dataclass(frozen=True)
class TextTokens:
    """Projected text (B, L', D) whose last row stands for `num_pads` equal padding rows.

    In a pack `documents` tells which tokens see which sample's text.
    """

    tokens: Tensor
    num_pads: int
    documents: Documents | None = None


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

    def forward(
        self, x: Tensor, rope: Tensor, documents: Documents | None, shared: SharedTokens | None
    ) -> Tensor:
        weight = torch.stack((self.norm_q, self.norm_k))
        q, k, v = NormRotateHeads.apply(self.qkv(x), weight, rope, self.num_heads, self.eps)
        if shared is not None:
            h = shared.attention(q, k, v, documents)
        else:
            h = attention(q, k, v, documents=documents)  # (B, H, N, Dh)
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
        if text.documents is not None:
            k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (k, v))  # (1, H, B·L, Dh)
        h = attention(q, k, v, key_bias=bias, documents=text.documents)
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
        rows: Tensor | None,
        rope: Tensor,
        documents: Documents | None,
        shared: SharedTokens | None,
    ) -> Tensor:
        """x (B, N, D), modulation (6, B, K, D) fp32, rows (B, N) of (B·K, D) → (B, N, D)."""
        table = self.modulation[:, None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation + table  # each (B, K, D)
        h = ModulatedNorm.apply(x, shift1, scale1, rows, self.eps)
        x = GatedAdd.apply(x, self.self_attn(h, rope, documents, shared), gate1, rows)
        h = x if self.norm_cross is None else self.norm_cross(x).to(x.dtype)
        x = x + self.cross_attn(h, text)
        h = ModulatedNorm.apply(x, shift2, scale2, rows, self.eps)
        return GatedAdd.apply(x, self.mlp(h), gate2, rows)


class DiT(nn.Module):
    """Predicts velocity (or the clean latents) for noisy latents; see the module's docstring."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch_volume = config.hidden_size, math.prod(config.patch_size)
        self.checkpointing = "none"
        self.group: dist.ProcessGroup | None = None
        self.sequencer = Sequencer(config.patch_size, config.num_heads, config.head_dim)
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
        latents: Tensor | Sequence[Video],
        t: Tensor | None,
        text_embeds: Tensor,
        text_lens: Tensor | None = None,
        *,
        levels: Tensor | None = None,
        level_index: Tensor | None = None,
        extra: Sequence[Segment] = (),
        extra_t: Tensor | None = None,
        budget: int | None = None,
    ) -> Tensor | list[Tensor]:
        """latents (B, C, T, H, W), text_embeds (B, L, Dt) → prediction (B, C', T, H, W) in fp32,
        whatever the dtype of input and weights (those of inference may be all bf16).

        t (B,) in [0, 1] is each sample's noise level, 1 pure noise. With `levels` (B, K) and
        `level_index` (B, N) token n has level `levels[b, level_index[b, n]]` and t is not read.
        `extra` segments are given beside the latents, at level `extra_t` (B,), clean without.
        Rows of text_embeds from `text_lens[b]` on are zero padding that is attended to; they cost
        as much as one row. Keep text_lens (B,) on the CPU: its maximum is read on the host.

        A pack is a list of B videos of any sizes, which bring level_index and extra along; so is
        its result, (C', T, H, W) each. With `budget` it is padded to as many tokens and the text
        to L: all packs of B have the same shapes then, so that compiled graphs serve them all.

        Raises:
            ValueError: a size that the patch size does not divide, a pack above its budget, or an
                argument that belongs to the other form.
        """
        if levels is None:
            if t is None:
                raise ValueError("DiT needs t (B,), or levels (B, K) with level_index (B, N)")
            levels, level_index = t[:, None], None
        is_pack = not isinstance(latents, Tensor)
        of_other_form = (extra or level_index is not None) if is_pack else budget
        if of_other_form:
            raise ValueError("budget is for packs, whose videos bring level_index and extra along")
        if extra or budget or (is_pack and any(video.extra for video in latents)):
            clean = torch.zeros_like(levels[:, 0]) if extra_t is None else extra_t
            levels = torch.cat((levels, clean[:, None]), 1)
        if is_pack:
            sequence = self.sequencer.pack(latents, levels.shape[1], budget)
        else:
            sequence = self.sequencer.batch(latents, levels.shape[1], level_index, extra)
        own, shared, documents = sequence, None, None
        if self.group is not None:
            shared = SharedTokens(self.group, sequence.patches.shape[1])
            own = shared.share(sequence)
        text = self._text(text_embeds, text_lens, trim=budget is None)
        if is_pack:
            text, documents = self._documents(sequence, text, budget, shared)
        time, modulation = self._modulation(levels)
        x = self.patch_embed(own.patches.to(self.patch_embed.weight.dtype))  # (B, N, D)
        if self.config.absolute_positions:
            # Rotary angles only compare tokens. Where content is noise, nothing says which stands
            # left or first, so their sines and cosines are added, as DiT adds its own (§3.2).
            places = torch.view_as_real(own.rope).flatten(1).to(x.dtype)
            x = x + self.config.absolute_positions * places
        for block in self.blocks:
            x = self._run(block, x, text, modulation, own.rows, own.rope, documents, shared)
        shift, scale = time + self.modulation[:, None, None]  # each (B, K, D)
        x = self.head(ModulatedNorm.apply(x, shift, scale, own.rows, self.config.eps))
        x = x if shared is None else shared.gather(x)
        videos = self.sequencer.videos(x.float(), sequence)
        return [video[0] for video in videos] if is_pack else videos[0]

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return block(*inputs)
        contexts = _KEEP_PRODUCTS if self.checkpointing == "selective" else noop_context_fn
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    def _documents(
        self,
        sequence: TokenSequence,
        text: TextTokens,
        budget: int | None,
        shared: SharedTokens | None,
    ) -> tuple[TextTokens, Documents]:
        """What the samples of a pack may see: of the text, kept with it, and of each other. The
        text is read by the tokens of this rank alone.

        Padding is a sample of its own that nobody else sees; it may read the last one's text.
        """
        lengths, device = sequence.lengths, sequence.patches.device
        readers = (*lengths[:-1], lengths[-1] + sequence.num_pads)
        if shared is not None:
            readers = shared.lengths(readers)
        # On a GPU the cross-attention repeats the key of the padding.
        num_keys = text.tokens.shape[1] + (0 if device.type == "cpu" else text.num_pads - 1)
        keys = (num_keys,) * len(readers)
        bound = 0 if budget is None else max(budget, num_keys)
        padded = lengths if budget is None else (*lengths, sequence.num_pads)
        text = replace(text, documents=Documents.of(readers, keys, device, bound))
        return text, Documents.of(padded, padded, device, bound)

    def set_checkpointing(self, kind: str) -> None:
        """What the backward pass finds of each block: `none` recomputes nothing; `selective` the
        cheap steps, and attention that a CPU writes out; `full` all but the block's input.

        Raises:
            ValueError: another kind.
        """
        if kind not in CHECKPOINTING:
            raise ValueError(f"activation checkpointing {kind!r} must be one of {CHECKPOINTING}")
        self.checkpointing = kind

    def share_tokens(self, group: dist.ProcessGroup) -> None:
        """From here on the ranks of the group compute each batch or pack together: all call the
        model with the same input, each holds its share of the tokens, all get the whole prediction.

        Gradients of parameters are a rank's part of the sum over the group.

        Raises:
            ValueError: the heads do not divide by the ranks.
        """
        if self.config.num_heads % group.size():
            raise ValueError(
                f"model.num_heads={self.config.num_heads} must be divisible by the {group.size()} "
                "ranks that share the tokens: take a group of another size"
            )
        self.group = group

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile each block, alike ones share the code; names of weights stay."""
        for block in self.blocks:
            block.compile(**options)

    def _modulation(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """levels (B, K) → time embedding (B, K, D) and its projection (6, B, K, D), fp32."""
        with torch.autocast(levels.device.type, enabled=False):
            waves = timestep_embedding(levels, self.config.freq_dim)
            time = self.time_embed(waves.to(self.time_embed.fc1.weight.dtype))  # (B, K, D)
            modulation = self.time_proj(F.silu(time)).unflatten(-1, (6, -1)).movedim(2, 0)
            return time.float(), modulation.float()

    def _text(self, embeds: Tensor, lens: Tensor | None, trim: bool) -> TextTokens:
        """Project the text; of its padding only one row where that saves anything."""
        length, used = embeds.shape[1], embeds.shape[1]
        if trim and lens is not None and lens.device.type == "cpu":
            used = int(lens.max())
        num_pads = length - used
        if num_pads > 1:
            embeds = embeds[:, : used + 1]
        tokens = self.text_embed(embeds.to(self.text_embed.fc1.weight.dtype))
        return TextTokens(tokens, max(num_pads, 1))

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
