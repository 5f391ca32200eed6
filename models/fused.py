"""Fused layers with hand-written gradients: few passes over memory, few saved tensors.

In eager mode these norms, rotations and gates cost more than the matrix products of a small model.
Each class computes in fp32 and returns the dtype of its input; each saves one tensor of the size
of its input. Legend: B batch, N tokens, D hidden, H heads, Dh = D/H, K noise levels.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

GELU_SCALE = 2 * math.sqrt(2 / math.pi)  # tanh(u) = 2·sigmoid(2u) − 1
GELU_CUBIC = 0.044715
CHUNK = 1 << 17  # elements worked on at a time on a CPU: the pieces stay in the cache
GROUP = 1 << 22  # elements of attention weights: the allocator uses such pieces again


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
        out, factor, stats = torch.empty_like(x), 1 + scale, []
        with torch.autocast(x.device.type, enabled=False):
            for part in _tokens(x, x.shape[2]):
                normed, *moments = torch.ops.aten.native_layer_norm(
                    x[:, part].float(), x.shape[-1:], None, None, eps
                )
                stats.append(moments)  # (B, n, 1) each
                own = _part(rows, part)
                out[:, part] = torch.addcmul(spread(shift, own), normed, spread(factor, own))
        mean, rstd = (torch.cat(moments, 1) for moments in zip(*stats, strict=True))
        ctx.save_for_backward(x, mean, rstd, scale, rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, rows = ctx.saved_tensors
        d_x = torch.empty_like(x)
        d_shift, d_scale = torch.zeros_like(scale), torch.zeros_like(scale)
        factor = 1 + scale
        for part in _tokens(x, x.shape[2]):
            own, g, wide = _part(rows, part), grad[:, part].float(), x[:, part].float()
            # The kernel takes them for contiguous, whatever they are.
            stats = mean[:, part].contiguous(), rstd[:, part].contiguous()
            normed = (wide - stats[0]).mul_(stats[1])
            d_shift += collect(g, own, scale)
            d_scale += collect(normed.mul_(g), own, scale)
            d_x[:, part] = torch.ops.aten.native_layer_norm_backward(
                g * spread(factor, own), wide, wide.shape[-1:], *stats, None, None,
                [True, False, False],
            )[0]  # fmt: skip
        return d_x, d_shift, d_scale, None, None


class GatedAdd(Function):
    """x + gate·branch; x, branch (B, N, D), gate (B, K, D) fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(branch, gate, rows)
        out = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for part in _tokens(x, x.shape[2]):
                wide, gates = branch[:, part].float(), spread(gate, _part(rows, part))
                out[:, part] = torch.addcmul(x[:, part].float(), wide, gates)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, rows = ctx.saved_tensors
        d_branch, d_gate = torch.empty_like(branch), torch.zeros_like(gate)
        for part in _tokens(branch, branch.shape[2]):
            own, wide = _part(rows, part), grad[:, part].float()
            d_gate += collect(wide * branch[:, part], own, gate)
            d_branch[:, part] = wide * spread(gate, own)
        return grad, d_branch, d_gate, None


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
        num_parts = x.shape[-1] // dim
        out = x.new_empty(num_parts, x.shape[0], num_heads, x.shape[1], dim // num_heads)
        rms = []
        with torch.autocast(x.device.type, enabled=False):
            for part in _tokens(x, parts * dim):
                wide = x[:, part, : parts * dim].to(torch.float32, copy=True)
                wide = wide.unflatten(-1, (parts, dim))  # (B, N, P, D)
                length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
                rms.append((length.square() / dim + eps).rsqrt())
                y = wide.mul_(rms[-1]).mul_(weight).unflatten(-1, (num_heads, -1))
                y = y if rope is None else _turn_(y, rope[part])
                out[:parts, :, :, part].copy_(y.permute(2, 0, 3, 1, 4))
        for index in range(parts, num_parts):
            rest = x[..., index * dim : (index + 1) * dim]
            out[index].copy_(rest.unflatten(-1, (num_heads, -1)).transpose(1, 2))
        ctx.save_for_backward(x, torch.cat(rms, 1), weight, rope)
        return tuple(out.unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rms, weight, rope = ctx.saved_tensors
        parts, dim = weight.shape
        heads = grads[0].shape[1]
        d_x, d_weight = torch.empty_like(x), torch.zeros_like(weight)
        target = d_x.unflatten(-1, (len(grads), heads, -1))  # (B, N, S, H, Dh)
        for part in _tokens(x, parts * dim):
            grad = torch.empty(target[:, part, :parts].shape, device=x.device)
            for index in range(parts):
                grad[:, :, index] = grads[index][:, :, part].transpose(1, 2)
            grad = grad if rope is None else _turn_(grad, rope[part], back=True)
            grad = grad.flatten(-2)  # (B, N, P, D)
            normed = x[:, part, : parts * dim].to(torch.float32, copy=True)
            normed = normed.unflatten(-1, (parts, dim)).mul_(rms[:, part])
            d_weight += (grad * normed).sum((0, 1))
            grad = grad.mul_(weight)
            slope = (grad * normed).mean(-1, keepdim=True)
            grad.addcmul_(normed, slope, value=-1).mul_(rms[:, part])
            target[:, part, :parts] = grad.unflatten(-1, (heads, -1))
        for index, rest in enumerate(grads[parts:], start=parts):
            target[:, :, index] = rest.transpose(1, 2)
        return d_x, d_weight, None, None, None


def _tokens(x: Tensor, width: int) -> list[slice]:
    """Tokens of x (B, N, ...) that are worked on at a time, `width` elements each: on a CPU they
    make about CHUNK elements. A compiler finds its own pieces."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    size = max(1, CHUNK // (x.shape[0] * width))
    return [slice(first, first + size) for first in range(0, x.shape[1], size)]


def _part(rows: Tensor | None, part: slice) -> Tensor | None:
    return None if rows is None else rows[:, part]


def _turn_(x: Tensor, rope: Tensor, *, back: bool = False) -> Tensor:
    """Multiply pairs of channels, read as complex numbers, in place; x (B, N, P, H, Dh) fp32.

    `back` multiplies by the conjugates. A compiler sees real numbers: inductor knows no others.
    """
    pairs, rope = x.unflatten(-1, (-1, 2)), rope[:, None]
    if not torch.compiler.is_compiling():
        torch.view_as_complex(pairs).mul_(rope.conj() if back else rope)
        return x
    (real, imag), (cos, sin) = pairs.unbind(-1), torch.view_as_real(rope).unbind(-1)
    sin = -sin if back else sin
    return torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1).flatten(-2)


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
    """Rows (M, ...) that are worked on at a time, as `_tokens`."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return (rows,)
    return rows.split(max(1, CHUNK // rows.shape[1:].numel()))


def _unit(rows: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """Rows scaled to length `gain`, and the factors (M, 1) that did it; fp32."""
    wide = rows.float()
    factor = gain / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    return wide * factor, factor


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(scale·q·kᵀ + bias)·v written out; q (M, N, Dh), k and v (M, L, Dh), M = B·H.

    A few heads at a time: products and gradients of logits use the same memory again. A compiler
    takes it as one operator: what inductor makes of its parts takes 1.4 times as long.
    """
    if torch.compiler.is_compiling():
        return _attend_op(q, k, v, bias)[0]
    return ExplicitAttention.apply(q, k, v, bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the queries find, and the weights (M, N, L)."""
    scale = 1 / math.sqrt(q.shape[-1])
    out, weights = _attend_shapes(q, k, v, bias)
    with torch.autocast(q.device.type, enabled=False):
        start, beta = (q.new_zeros(()), 0) if bias is None else (bias.to(q.dtype), 1)
        for probs, found, query, key, value in _by_heads(weights, out, q, k, v):
            logits = torch.baddbmm(start, query, key.transpose(1, 2), beta=beta, alpha=scale)
            torch.softmax(logits, -1, out=probs)
            found.copy_(torch.bmm(probs, value))  # in eager mode, selective checkpointing keeps it
    return out, weights


def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(*q.shape[:2], k.shape[1])


def _attend_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    scale, zero = 1 / math.sqrt(q.shape[-1]), q.new_zeros(())
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    parts = _by_heads(weights, grad, q, k, v, d_q, d_k, d_v)
    for probs, g, query, key, value, d_query, d_key, d_value in parts:
        torch.bmm(probs.transpose(1, 2), g, out=d_value)
        d_logits = torch.bmm(g, value.transpose(1, 2))
        # row by row, in place
        torch.ops.aten._softmax_backward_data(d_logits, probs, -1, q.dtype, grad_input=d_logits)
        torch.baddbmm(zero, d_logits, key, beta=0, alpha=scale, out=d_query)
        torch.baddbmm(zero, d_logits.transpose(1, 2), query, beta=0, alpha=scale, out=d_key)
    return d_q, d_k, d_v


def _by_heads(weights: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Weights (M, N, L) and what belongs to them, of some heads at a time, at least one: of as many
    as have about GROUP weights together."""
    size = max(1, GROUP // weights[0].numel())
    return zip(*(tensor.split(size) for tensor in (weights, *others)), strict=True)


class ExplicitAttention(Function):
    """`explicit_attention` in eager mode."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out, weights = _attend(q, k, v, bias)
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_attend_back(grad, *ctx.saved_tensors), None


_attend_op = torch.library.custom_op("longtake::attend", _attend, mutates_args=())
_attend_back_op = torch.library.custom_op("longtake::attend_back", _attend_back, mutates_args=())
_attend_op.register_fake(_attend_shapes)


@_attend_back_op.register_fake
def _attend_back_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_weights(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def _attend_op_back(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_back_op(grad, *ctx.saved_tensors), None


_attend_op.register_autograd(_attend_op_back, setup_context=_keep_weights)


class GeluTanh(Function):
    """x·sigmoid(2u), u = √(2/π)·(x + 0.044715·x³): the tanh form of GELU without its slow tanh.

    Saves the derivative in the input's dtype, so that the backward pass is one product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out, slope = torch.empty_like(x), torch.empty_like(x)
        chunks = (_pieces(tensor.view(-1)) for tensor in (x, out, slope))
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
