"""Attention behind one function: the kernel is chosen by device, dtype and length."""

import torch.nn.functional as F
from torch import Tensor

from longtake.models.fused import ExplicitAttention

# Measured on CPU in bf16: a written-out softmax beats the fused kernel up to about this many keys.
EXPLICIT_MAX_KEYS = 3072


def attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """Softmax attention, softmax(q·kᵀ/√Dh + key_bias)·v.

    q (B, H, N, Dh), k and v (B, H, L, Dh) → (B, H, N, Dh). `key_bias` (L,) is added to the logits
    of every query: log(n) makes one key stand for n equal ones.
    """
    if q.device.type == "cpu" and k.shape[2] <= EXPLICIT_MAX_KEYS:
        out = ExplicitAttention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), key_bias)
        return out.unflatten(0, q.shape[:2])
    mask = None if key_bias is None else key_bias.to(q.dtype).expand(q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
