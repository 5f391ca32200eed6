"""Attention behind one function: the kernel is chosen by device, dtype and length."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from longtake.models.fused import explicit_attention
from longtake.models.transfer import to_device

# Measured on CPU: with its gradients, a written-out softmax beats the fused kernel up to about this
# many keys; without, the fused kernel is faster at any number.
EXPLICIT_MAX_KEYS = {torch.float32: 128, torch.bfloat16: 3072}


@dataclass(frozen=True)
class Documents:
    """Samples that share one sequence: queries of sample i see its keys and no others.

    The lengths of both add up to the sequences; `ends` are their running sums (samples + 1) from 0
    on as int32, on the device. `max_tokens` bounds all lengths.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_ends: Tensor
    key_ends: Tensor
    max_tokens: int

    @classmethod
    def of(
        cls, queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device, bound: int = 0
    ) -> Self:
        """Documents of these lengths; a `bound` on all of them keeps compiled graphs alike."""
        query_ends, key_ends = (
            to_device(torch.tensor((0, *lengths)).cumsum(0).int(), device)
            for lengths in (queries, keys)
        )
        return cls(queries, keys, query_ends, key_ends, bound or max(*queries, *keys))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_bias: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Softmax attention, softmax(q·kᵀ/√Dh + key_bias)·v.

    q (B, H, N, Dh), k and v (B, H, L, Dh) → (B, H, N, Dh). `key_bias` (L,) is added to the logits
    of every query: log(n) makes one key stand for n equal ones. With `documents` B is 1,
    attention is block-diagonal, and the bias is that of each document's keys.
    """
    if documents is None:
        return _dense(q, k, v, key_bias)
    if key_bias is None and has_varlen(q):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H, Dh)
        ends, longest = (documents.query_ends, documents.key_ends), documents.max_tokens
        out = varlen_attn(q, k, v, *ends, longest, longest)
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)[None]
    return _by_document(q, k, v, key_bias, documents)


def has_varlen(q: Tensor) -> bool:
    """Whether torch's kernel for sequences of samples (FlashAttention) takes such queries."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def _dense(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    longest = EXPLICIT_MAX_KEYS.get(q.dtype, 0) if torch.is_grad_enabled() else 0
    if q.device.type == "cpu" and k.shape[2] <= longest:
        out = explicit_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), key_bias)
        return out.unflatten(0, q.shape[:2])
    mask = None if key_bias is None else key_bias.to(q.dtype).expand(q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.compiler.disable  # else every composition of a pack is a graph of its own
def _by_document(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, documents: Documents
) -> Tensor:
    """Exact everywhere: documents of equal lengths are a batch."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index, lengths in enumerate(zip(documents.queries, documents.keys, strict=True)):
        if lengths[0]:  # else nobody asks here
            alike.setdefault(lengths, []).append(index)
    queries, keys = q.split(documents.queries, 2), k.split(documents.keys, 2)
    values = v.split(documents.keys, 2)
    out = list(queries)
    for members in alike.values():
        q, k, v = (torch.cat([parts[i] for i in members]) for parts in (queries, keys, values))
        for index, one in zip(members, _dense(q, k, v, key_bias).split(1), strict=True):
            out[index] = one
    return torch.cat(out, 2)
