"""Attention behind one function: the kernel is chosen by device, dtype and length."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured on CPU in bf16: a written-out softmax beats the fused kernel up to about this many keys.
EXPLICIT_MAX_KEYS = 3072


def attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """Softmax attention, softmax(q·kᵀ/√Dh + key_bias)·v.

    q (B, H, N, Dh), k and v (B, H, L, Dh) → (B, H, N, Dh). `key_bias` (L,) is added to the logits
    of every query: log(n) makes one key stand for n equal ones.
    """
    if q.device.type == "cpu" and k.shape[2] <= EXPLICIT_MAX_KEYS:
        return _explicit(q, k, v, key_bias)
    mask = None if key_bias is None else key_bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _explicit(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    batch, heads = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B·H, N|L, Dh)
    scale = 1 / math.sqrt(q.shape[-1])
    if key_bias is None:
        key_bias, beta = q.new_zeros(()), 0.0
    else:
        key_bias, beta = key_bias.to(q.dtype), 1.0
    logits = torch.baddbmm(key_bias, q, k.transpose(1, 2), beta=beta, alpha=scale)
    return torch.bmm(logits.softmax(-1), v).unflatten(0, (batch, heads))
