"""Hand-written gradients against those of the plain formulas, over several cache-sized pieces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.models import fused
from longtake.models.attention import attention


class Calls(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[object] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def same(found: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    left, right = found(*leaves), expected(*leaves)
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    weight = torch.randn(right.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad((left * weight).sum(), leaves),
        torch.autograd.grad((right * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK", 50)
    monkeypatch.setattr(fused, "GROUP", 70)


@pytest.mark.usefixtures("small_pieces")
def test_gelu() -> None:
    same(fused.GeluTanh.apply, lambda x: F.gelu(x, approximate="tanh"), 3 * torch.randn(3, 7, 11))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_channel_norm_silu(layout: torch.memory_format) -> None:
    x = torch.randn(2, 6, 3, 4, 5).contiguous(memory_format=layout)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.silu(F.normalize(x, dim=1) * 6**0.5 * weight.view(-1, 1, 1, 1))

    same(fused.ChannelNormSilu.apply, plain, x, torch.randn(6))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("explicit_max_keys", [0, 100])
def test_attention(
    with_bias: bool, explicit_max_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "longtake.models.attention.EXPLICIT_MAX_KEYS", {torch.float32: explicit_max_keys}
    )
    bias = torch.tensor([0.0, 0.0, 1.5, 0.3, 0.0]) if with_bias else None

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) / 8**0.5
        return (logits if bias is None else logits + bias).softmax(-1) @ v

    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    same(
        lambda q, k, v: attention(q, k, v, key_bias=bias),
        plain,
        q, k, v,
    )  # fmt: skip


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_without_gradients_is_the_fused_kernel(
    dtype: torch.dtype, atol: float, with_bias: bool
) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (4, 5, 5))
    bias = torch.randn(5) if with_bias else None
    with Calls() as training:
        expected = attention(q, k, v, key_bias=bias)
    with Calls() as drawing, torch.no_grad():
        found = attention(q, k, v, key_bias=bias)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    written_out = torch.ops.aten.baddbmm.default
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert (written_out in training.seen, kernel in training.seen) == (True, False)
    assert (written_out in drawing.seen, kernel in drawing.seen) == (False, True)


@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_for_a_compiler_is_one_operator(with_bias: bool) -> None:
    q, k, v = torch.randn(6, 4, 8), torch.randn(6, 5, 8), torch.randn(6, 5, 8)
    bias = torch.randn(5) if with_bias else None
    targets: list[object] = []

    def keep(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        targets.extend(node.target for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(fused.explicit_attention, backend=keep, fullgraph=True)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused.explicit_attention(q, k, v, bias)

    same(lambda q, k, v: compiled(q, k, v, bias), plain, q, k, v)
    assert torch.ops.longtake.attend.default in targets
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(torch.ops.longtake.attend.default, (*leaves, bias))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("num_levels", [1, 2])
def test_modulated_norm_and_gate(num_levels: int) -> None:
    x, branch = torch.randn(3, 7, 6), torch.randn(3, 7, 6)  # in pieces of two tokens
    shift, scale, gate = torch.randn(3, 3, num_levels, 6).unbind(0)
    index = torch.randint(0, num_levels, (3, 7))
    rows = index + num_levels * torch.arange(3)[:, None] if num_levels > 1 else None
    per_token = index[..., None].expand(-1, -1, 6)

    def plain(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        shift, scale, gate = (values.gather(1, per_token) for values in (shift, scale, gate))
        return (F.layer_norm(x, (6,)) * (1 + scale) + shift) + gate * branch

    def found(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        normed = fused.ModulatedNorm.apply(x, shift, scale, rows, 1e-5)
        return fused.GatedAdd.apply(normed, branch, gate, rows)

    same(found, plain, x, branch, shift, scale, gate)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_norm_rotate_heads(parts: int) -> None:
    """Of three parts in a row the first are normed and turned, two tokens at a time."""
    heads, head_dim, eps = 2, 4, 1e-6
    angles = torch.randn(7, heads, head_dim // 2)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        each = x.unflatten(-1, (3, -1))  # (B, N, S, D)
        normed = F.rms_norm(each[:, :, :parts], each.shape[-1:], eps=eps) * weight
        pairs = normed.unflatten(-1, (heads, -1, 2))  # (B, N, P, H, Dh/2, 2)
        cos, sin = (values[:, None] for values in (angles.cos(), angles.sin()))
        a, b = pairs.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        rest = each[:, :, parts:].unflatten(-1, (heads, -1))
        return torch.cat((turned, rest), 2).permute(2, 0, 3, 1, 4)  # (S, B, H, N, Dh)

    def found(x: Tensor, weight: Tensor) -> Tensor:
        rope = torch.polar(torch.ones_like(angles), angles)
        return torch.stack(fused.NormRotateHeads.apply(x, weight, rope, heads, eps))

    same(
        found, plain, torch.randn(3, 7, 3 * heads * head_dim), torch.randn(parts, heads * head_dim)
    )


def test_bf16_stays_close_to_fp32() -> None:
    x = torch.randn(2, 8, 3, 4, 4)
    exact = fused.ChannelNormSilu.apply(x, torch.ones(8))
    found = fused.ChannelNormSilu.apply(x.bfloat16(), torch.ones(8))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0.02)
