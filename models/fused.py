"""Fused layers with hand-written gradients: few passes over memory, few saved tensors.

In eager mode these norms, rotations and gates cost more than the matrix products of a small model.
Each class computes in fp32 and returns the dtype of its input; each saves one tensor of the size
of its input. Legend: B batch, N tokens, D hidden, H heads, Dh = D/H, K noise levels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

GELU_SCALE = 2 * math.sqrt(2 / math.pi)  # tanh(u) = 2·sigmoid(2u) − 1
GELU_CUBIC = 0.044715
CHUNK = 1 << 17  # elements worked on at a time on a CPU: the pieces stay in the cache


def spread(values: Tensor, rows: Tensor | None) -> Tensor:
    """Per level (B, K, D) → per token (B, N, D): `rows` are rows of (B·K, D); (B, 1, D) without."""
    return values if rows is None else F.embedding(rows, values.flatten(0, 1))


def collect(grad: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Gradient of `spread`: sums over the tokens of each level, (B, N, D) → (B, K, D) of `like`."""
    if rows is None:
        return grad.sum(1, keepdim=True)
    num_rows = like.shape[0] * like.shape[1]
    grad, rows = grad.flatten(0, 1), rows.flatten()
    if grad.device.type == "cpu":
        sums = grad.new_zeros(num_rows, grad.shape[1]).index_add_(0, rows, grad)
    else:  # a matrix product sums in a fixed order, atomic additions would not
        sums = F.one_hot(rows, num_rows).float().T @ grad
    return sums.view_as(like)


class ModulatedNorm(Function):
    """LayerNorm(x)·(1 + scale) + shift; x (B, N, D), shift and scale (B, K, D) fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            mean = wide.mean(-1, keepdim=True)
            normed = wide - mean
            length = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
            rstd = (length.square() / x.shape[-1] + eps).rsqrt()
            normed.mul_(rstd)
            out = torch.addcmul(spread(shift, rows), normed, spread(1 + scale, rows))
        ctx.save_for_backward(x, mean, rstd, scale, rows)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, rows = ctx.saved_tensors
        grad, wide = grad.float(), x.float()
        normed = (wide - mean).mul_(rstd)
        d_shift = collect(grad, rows, scale)
        d_scale = collect(normed.mul_(grad), rows, scale)
        d_x = torch.ops.aten.native_layer_norm_backward(
            grad * spread(1 + scale, rows),
            wide,
            wide.shape[-1:],
            mean,
            rstd,
            None,
            None,
            [True, False, False],
        )[0]
        return d_x.to(x.dtype), d_shift, d_scale, None, None


class GatedAdd(Function):
    """x + gate·branch; x, branch (B, N, D), gate (B, K, D) fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(branch, gate, rows)
        with torch.autocast(x.device.type, enabled=False):
            return torch.addcmul(x.float(), branch.float(), spread(gate, rows)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, rows = ctx.saved_tensors
        wide = grad.float()
        d_gate = collect(wide * branch.float(), rows, gate)
        return grad, (wide * spread(gate, rows)).to(branch.dtype), d_gate, None


class NormRotateHeads(Function):
    """RMS-norm rows over all heads, rotate pairs, split heads: (B, N, S·D) → S × (B, H, N, Dh).

    weight (P, D) norms the first P of the S parts, and only those are rotated. rope (N, H, Dh/2)
    complex64 turns the channel pairs (2j, 2j + 1) of each head; None turns nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rope: Tensor | None, num_heads: int, eps: float
    ) -> tuple[Tensor, ...]:
        parts, dim = weight.shape
        with torch.autocast(x.device.type, enabled=False):
            wide = x[..., : parts * dim].float().unflatten(-1, (parts, dim))  # (B, N, P, D)
            length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            rms = (length.square() / dim + eps).rsqrt()
            y = wide.mul(rms).mul_(weight).unflatten(-1, (num_heads, -1))  # (B, N, P, H, Dh)
            y = _turn(y, rope).to(x.dtype)
        num_parts = x.shape[-1] // dim
        out = x.new_empty(num_parts, x.shape[0], num_heads, x.shape[1], dim // num_heads)
        out[:parts].copy_(y.permute(2, 0, 3, 1, 4))
        rest = x[..., parts * dim :].unflatten(-1, (num_parts - parts, num_heads, dim // num_heads))
        out[parts:].copy_(rest.permute(2, 0, 3, 1, 4))
        ctx.save_for_backward(x, rms, weight, rope)
        return tuple(out.unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rms, weight, rope = ctx.saved_tensors
        parts, dim = weight.shape
        batch, heads, length, head_dim = grads[0].shape
        grad = torch.empty(batch, length, parts, heads, head_dim, device=x.device)
        for part in range(parts):
            grad[:, :, part].copy_(grads[part].transpose(1, 2))
        grad = _turn(grad, None if rope is None else rope.conj()).flatten(-2)  # (B, N, P, D)
        normed = x[..., : parts * dim].float().unflatten(-1, (parts, dim)).mul(rms)
        d_weight = (grad * normed).sum((0, 1))
        grad = grad.mul_(weight)
        slope = (grad * normed).mean(-1, keepdim=True)
        grad.addcmul_(normed, slope, value=-1).mul_(rms)
        d_x = torch.empty_like(x)
        d_x[..., : parts * dim].copy_(grad.flatten(-2))
        for index, rest in enumerate(grads[parts:], start=parts):
            target = d_x[..., index * dim : (index + 1) * dim].unflatten(-1, (heads, head_dim))
            target.copy_(rest.transpose(1, 2))
        return d_x, d_weight, None, None, None


def _turn(x: Tensor, rope: Tensor | None) -> Tensor:
    """Multiply pairs of channels, read as complex numbers; x (B, N, P, H, Dh) fp32."""
    if rope is None:
        return x
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[:, None]).flatten(-2)


class ChannelNormSilu(Function):
    """silu(x / ‖x‖ · √C · weight) over the channels of each position; x (B, C, ...).

    Works on channels-last memory, a cache-sized piece at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = _channel_rows(x)  # (M, C)
        out = torch.empty_like(rows)
        gain = math.sqrt(rows.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            for piece, out_piece in zip(_pieces(rows), _pieces(out), strict=True):
                normed, _ = _unit(piece, gain)
                out_piece.copy_(F.silu(normed.mul_(weight), inplace=True))
        ctx.save_for_backward(rows, weight)
        ctx.shape = x.movedim(1, -1).shape
        return out.view(ctx.shape).movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        gain = math.sqrt(rows.shape[1])
        d_rows, d_weight = torch.empty_like(rows), torch.zeros_like(weight)
        grads = _pieces(_channel_rows(grad))
        for piece, g, target in zip(_pieces(rows), grads, _pieces(d_rows), strict=True):
            normed, factor = _unit(piece, gain)
            g = torch.ops.aten.silu_backward(g.float(), normed * weight)
            product = g * normed
            d_weight += product.sum(0)
            slope = product.mul_(weight).mean(-1, keepdim=True)
            target.copy_(g.mul_(weight).addcmul_(normed, slope, value=-1).mul_(factor))
        return d_rows.view(ctx.shape).movedim(-1, 1), d_weight


def _channel_rows(x: Tensor) -> Tensor:
    """(B, C, ...) → (M, C), without a copy in channels-last memory."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    size = CHUNK // rows.shape[1] if rows.device.type == "cpu" else rows.shape[0]
    return rows.split(max(size, 1))


def _unit(rows: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """Rows scaled to length `gain`, and the factors (M, 1) that did it; fp32."""
    wide = rows.float()
    factor = gain / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    return wide * factor, factor


class ExplicitAttention(Function):
    """softmax(scale·q·kᵀ + bias)·v written out; q (M, N, Dh), k and v (M, L, Dh), M = B·H."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        with torch.autocast(q.device.type, enabled=False):
            start, beta = (q.new_zeros(()), 0) if bias is None else (bias.to(q.dtype), 1)
            logits = torch.baddbmm(start, q, k.transpose(1, 2), beta=beta, alpha=scale)
            # The bf16 softmax kernel is slower than converting to fp32 and back.
            weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
            out = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        d_v = torch.bmm(weights.transpose(1, 2), grad)
        d_weights = torch.bmm(grad, v.transpose(1, 2))
        d_logits = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, q.dtype)
        zero = q.new_zeros(())
        d_q = torch.baddbmm(zero, d_logits, k, beta=0, alpha=scale)
        d_k = torch.baddbmm(zero, d_logits.transpose(1, 2), q, beta=0, alpha=scale)
        return d_q, d_k, d_v, None


class GeluTanh(Function):
    """x·sigmoid(2u), u = √(2/π)·(x + 0.044715·x³): the tanh form of GELU without its slow tanh.

    Saves the derivative in the input's dtype, so that the backward pass is one product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out, slope = torch.empty_like(x), torch.empty_like(x)
        chunks = (tensor.view(-1).split(CHUNK) for tensor in (x, out, slope))
        for piece, out_piece, slope_piece in zip(*chunks, strict=True):
            wide = piece.float()
            square = wide * wide
            gate = (square * (GELU_SCALE * GELU_CUBIC)).add_(GELU_SCALE).mul_(wide).sigmoid_()
            value = wide * gate
            square.mul_(3 * GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE)
            out_piece.copy_(value)
            value.addcmul_(value, gate, value=-1)  # x·s·(1 − s)
            slope_piece.copy_(gate.addcmul_(value, square))
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope
