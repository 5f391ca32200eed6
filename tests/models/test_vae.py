"""The VAE: causality, gradients, shapes, errors and the fast paths of its convolutions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from longtake.models import vae_conv
from longtake.models.vae import VAE, Posterior, vae_hash
from longtake.models.vae_blocks import AverageDown, DuplicateUp, pack_pixels, unpack_pixels
from longtake.models.vae_config import VAEConfig
from longtake.models.vae_conv import CausalConv3d, convolve
from tests.models.small_vaes import CONFIGS, TINY, make_vae, video


@pytest.mark.parametrize("name", ["4x4x4", "residual 4x8x8"])
@pytest.mark.parametrize("changed", [1, 4, 5, 8])
@torch.no_grad()
def test_causal(name: str, changed: int) -> None:
    """Pixel frame t reaches no latent before ⌈t/4⌉, and latent j no pixel before 4j − 3."""
    vae = make_vae(CONFIGS[name])
    x = video(9, 8, 8, batch=2)
    other = x.clone()
    other[:, :, changed] += 1
    first = -(-changed // 4)
    a, b = vae.encode(x).mean, vae.encode(other).mean
    assert torch.equal(a[:, :, :first], b[:, :, :first])
    assert not torch.equal(a[:, :, first], b[:, :, first])
    z = a.clone()
    z[:, :, first] += 1
    c, d = vae.decode(a), vae.decode(z)
    assert torch.equal(c[:, :, : 4 * first - 3], d[:, :, : 4 * first - 3])
    assert not torch.equal(c[:, :, 4 * first - 3], d[:, :, 4 * first - 3])


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 5e-2), (torch.half, 5e-3), (torch.double, 1e-5)]
)
@pytest.mark.parametrize("name", ["4x4x4", "residual 4x8x8"])
@torch.no_grad()
def test_weights_of_inference_have_any_dtype(name: str, dtype: torch.dtype, error: float) -> None:
    vae, x = make_vae(CONFIGS[name]), video(9, 16, 16)
    latents = vae.encode(x).mean
    pixels = vae.decode(latents)
    vae.to(dtype)
    for kind in (torch.float32, dtype):
        mean, decoded = vae.encode(x.to(kind)).mean, vae.decode(latents.to(kind))
        assert mean.dtype == decoded.dtype == torch.float32
        assert (mean - latents).norm() < error * latents.norm()
        assert (decoded - pixels).norm() < error * pixels.norm()


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3, 3), 1), ((3, 1, 1), 1), ((1, 1, 1), 1), ((3, 1, 1), 2)]
)
def test_conv_fast_paths_equal_the_plain_convolution(
    frames: int, kernel: tuple[int, int, int], stride: int
) -> None:
    """Other kernels run; outputs and gradients must not change."""
    frames = max(frames, kernel[0]) if stride == 2 else frames
    torch.manual_seed(frames)
    conv = CausalConv3d(3, 4, kernel, time_stride=stride)
    x = torch.randn(1, 3, frames, 6, 5, requires_grad=True)
    rim, past = kernel[1] // 2, kernel[0] - 1 if stride == 1 else 0
    padded = nn.functional.pad(x, (rim, rim, rim, rim, past, 0))
    expected = nn.functional.conv3d(padded, conv.weight, conv.bias, stride=(stride, 1, 1))
    found = conv(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(expected)
    inputs = [x, *conv.parameters()]
    a = torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True)
    b = torch.autograd.grad((found * weight).sum(), inputs)
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(right, left, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 16, 4, 16, 18), (1, 20, 1, 17, 16), (3, 16, 16, 17)])
def test_weight_gradient_by_products_equals_the_plain_one(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_conv, "HAS_WIDE_VECTORS", False)
    torch.manual_seed(0)
    dims = len(shape) - 2
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(18, shape[1], *[3] * (dims - 2), 3, 3)[:, :, : shape[2]]
    inputs = x, weight.clone().requires_grad_(), torch.randn(18, requires_grad=True)
    plain: Any = (nn.functional.conv2d, nn.functional.conv3d)[dims - 2]
    expected = plain(*inputs, padding=(*[0] * (dims - 2), 1, 1))
    found = convolve(*inputs)
    assert found.grad_fn is not None and found.grad_fn.name() == "_ConvolutionBackward"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    outward = torch.randn_like(expected)
    a = torch.autograd.grad(expected, inputs, outward)
    b = torch.autograd.grad(found, inputs, outward)
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(right, left, atol=1e-3, rtol=1e-4)
    monkeypatch.setattr(vae_conv, "HAS_WIDE_VECTORS", True)
    found = convolve(*inputs)
    assert found.grad_fn is not None and found.grad_fn.name() == "ConvolutionBackward0"


@pytest.mark.parametrize("batch", [1, 2])
def test_bf16_weight_gradients_of_large_frames_are_right(batch: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(batch, 32, 7, 64, 64), 0.03 * torch.randn(32, 32, 3, 3, 3)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        cast = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
        inputs = [tensor.requires_grad_() for tensor in (cast, weight.clone(), torch.ones(32))]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = convolve(*inputs)
        outward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found[dtype] = [out, *torch.autograd.grad((out.float() * outward).sum(), inputs)]
    for exact, half in zip(*found.values(), strict=True):
        assert (half.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("frames", [1, 5, 33])
@pytest.mark.parametrize("channels", [4, 8])
@torch.no_grad()
def test_no_slow_convolution_runs(frames: int, channels: int) -> None:
    x = video(frames, 16, 16)
    vae = VAE(replace(TINY, base_dim=channels))
    assert "aten::slow_conv3d" in operations(lambda: nn.Conv3d(3, 8, 3)(x.repeat(1, 1, 3, 1, 1)))
    assert "aten::slow_conv3d" not in operations(lambda: vae.decode(vae.encode(x).mean))


def operations(function: Callable[[], object]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


def test_average_down_and_duplicate_up() -> None:
    """The rule on numbers: groups of a cell in order (channel, time, row, column)."""
    x = torch.arange(1.0, 25.0).view(1, 1, 3, 2, 4)  # frames 1..8, 9..16, 17..24
    down = AverageDown(2, time=2, space=2)(x)  # the zero frame fills the first group
    assert down.shape == (1, 2, 2, 1, 2)
    assert down[0, :, 0, 0].tolist() == [[0.0, 0.0], [3.5, 5.5]]
    assert down[0, :, 1, 0].tolist() == [[11.5, 13.5], [19.5, 21.5]]
    up = DuplicateUp(1, time=2, space=2)(down)
    assert up.shape == x.shape
    assert up[0, 0, 0].tolist() == [[3.5, 3.5, 5.5, 5.5]] * 2  # of frame 0 the last copy stays
    assert up[0, 0, 1].tolist() == [[11.5, 11.5, 13.5, 13.5]] * 2
    assert up[0, 0, 2].tolist() == [[19.5, 19.5, 21.5, 21.5]] * 2


def test_packed_pixels_keep_their_place() -> None:
    x = torch.arange(16.0).view(1, 1, 1, 4, 4)
    packed = pack_pixels(x, 2)
    assert packed[0, :, 0, 0, 1].tolist() == [2.0, 6.0, 3.0, 7.0]  # columns before rows
    assert torch.equal(unpack_pixels(packed, 2), x)


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_blocks_give_equal_gradients(name: str) -> None:
    x = video(9, 16, 8, batch=2)
    kept, recomputed = (
        make_vae(replace(CONFIGS[name], checkpoint_blocks=recompute)) for recompute in (False, True)
    )
    saved = {}
    for vae in (kept, recomputed):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda x: x
        ):
            posterior = vae.encode(x)
            loss = vae.decode(posterior.mean).square().mean() + posterior.kl().mean()
        loss.backward()
        saved[vae] = sum(sizes)
    assert saved[recomputed] < 0.5 * saved[kept]
    for (parameter, a), b in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad), parameter


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_parts_are_one_graph_for_each_shape(recompute: bool) -> None:
    config = replace(CONFIGS["residual 4x8x8"], checkpoint_blocks=recompute)
    plain, compiled = make_vae(config), make_vae(config)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_parts(backend="aot_eager", fullgraph=True)
    for x in (video(9, 16, 8, batch=2), video(5, 16, 16, batch=2)):
        for vae in (plain, compiled):
            vae.zero_grad()
            posterior = vae.encode(x)
            (vae.decode(posterior.mean).square().mean() + posterior.kl().mean()).backward()
        for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["tiny 2x2x2", "residual 4x8x8"])
def test_bf16_autocast_is_close_and_gradients_flow(name: str) -> None:
    vae = make_vae(CONFIGS[name])
    x = video(5, 16, 16, batch=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(x)
        pixels = vae.decode(posterior.sample(torch.zeros_like(posterior.mean)))
    assert pixels.dtype == posterior.mean.dtype == torch.float32
    exact = vae.decode(vae.encode(x).mean)
    assert (pixels - exact).abs().mean() < 0.05 * exact.abs().mean()
    (pixels.square().mean() + posterior.kl().mean()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("config", [TINY, replace(TINY, dim_mult=(2, 2), residual=True)])
def test_fresh_vae_reconstructs_an_image_shape_and_learns(config: VAEConfig) -> None:
    torch.manual_seed(0)
    vae = VAE(config)
    x = video(5, 8, 8, batch=4)
    x = nn.functional.avg_pool3d(x, (1, 4, 4)).repeat_interleave(4, 3).repeat_interleave(4, 4)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        posterior = vae.encode(x)
        loss = (vae.decode(posterior.sample(torch.randn_like(posterior.mean))) - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_posterior() -> None:
    posterior = Posterior(torch.full((2, 1, 1, 1, 3), 2.0), torch.zeros(2, 1, 1, 1, 3))
    assert torch.allclose(posterior.kl(), torch.tensor([6.0, 6.0]))  # 3 latents of 2²/2
    assert torch.equal(
        posterior.sample(torch.ones(2, 1, 1, 1, 3)), torch.full((2, 1, 1, 1, 3), 3.0)
    )


def test_hash_names_weights_and_config() -> None:
    vae = VAE(TINY)
    state = vae.state_dict()
    first = vae_hash(state, TINY)
    assert first == vae_hash({k: v.clone() for k, v in reversed(state.items())}, TINY)
    state["decoder.conv_out.bias"].view(-1)[0] += 1.0  # makes no latents
    assert vae_hash(state, TINY) == first
    for name in ("quant.bias", "encoder.conv_in.weight"):
        changed = {**state, name: state[name].clone()}
        changed[name].view(-1)[0] += 1e-6
        assert vae_hash(changed, TINY) != first


def test_hash_leaves_out_what_makes_no_latents() -> None:
    state = VAE(TINY).state_dict()
    first = vae_hash(state, TINY)
    assert vae_hash(state, replace(TINY, checkpoint_blocks=True)) == first
    assert vae_hash(state, replace(TINY, decoder_base_dim=64)) == first
    assert vae_hash(state, replace(TINY, patch_size=2)) != first


def test_strides() -> None:
    for mult, time, strides in (
        ((1, 2), (True,), (2, 2, 2)),
        ((1, 2, 2), (True, True), (4, 4, 4)),
        ((1, 2, 4, 4), (False, True, True), (4, 8, 8)),
        ((1, 2, 4, 4), (False, True, True), (4, 16, 16)),
    ):
        config = VAEConfig(8, 4, mult, time, 1, patch_size=2 if strides[1] == 16 else 1)
        assert config.strides == strides
        assert config.latent_shape(9, 16, 32) == (
            1 + 8 // strides[0],
            16 // strides[1],
            32 // strides[2],
        )


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((1, 3, 4, 8, 8), "1 \\+ 2·k"),
        ((1, 3, 5, 7, 8), "multiples of 2"),
        ((1, 4, 5, 8, 8), "expected \\(B, 3"),
    ],
)
def test_wrong_videos_are_refused(shape: tuple[int, ...], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        VAE(TINY).encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"dim_mult": (1, 2, 2, 2), "temporal_downsample": (True, True, True)}, "at most twice"),
        ({"temporal_downsample": (True, True)}, "one less than vae.dim_mult"),
        ({"base_dim": 0}, "vae.base_dim=0"),
        ({"base_dim": 7, "dim_mult": (1, 3)}, "even"),
        ({"patch_size": 0}, "vae.patch_size=0"),
        ({"dim_mult": (3,), "temporal_downsample": (), "residual": True}, "8 values .* 24 equal"),
        ({"dim_mult": (2, 4), "residual": True}, "16 values do not make 32 equal groups"),
        ({"dim_mult": (5, 3), "residual": True}, "vae.dim_mult=\\(5, 3\\)"),
    ],
)
def test_wrong_configs_are_refused(change: dict, rule: str) -> None:
    base = {
        "base_dim": 8, "z_dim": 4, "dim_mult": (1, 2), "temporal_downsample": (True,),
        "num_res_blocks": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=rule):
        VAEConfig(**{**base, **change})
