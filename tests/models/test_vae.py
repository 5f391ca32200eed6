"""The VAE against diffusers, causality, shapes, errors and the fast paths of its convolutions."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from longtake.models.interop import vae_from_diffusers, vae_to_diffusers
from longtake.models.vae import VAE, Posterior, vae_hash
from longtake.models.vae_blocks import CausalConv3d
from longtake.models.vae_config import VAEConfig

TINY = VAEConfig(
    base_dim=8, z_dim=4, dim_mult=(1, 2), temporal_downsample=(True,), num_res_blocks=1
)
PEERS = {
    "4x8x8": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    },
    "4x4x4, wider decoder": {
        "base_dim": 6, "decoder_base_dim": 10, "z_dim": 3, "dim_mult": [1, 2, 3],
        "num_res_blocks": 1, "temperal_downsample": [True, True],
    },
    "2x2x2": {
        "base_dim": 8, "z_dim": 5, "dim_mult": [2, 3], "num_res_blocks": 1,
        "temperal_downsample": [True],
    },
    "time first": {
        "base_dim": 4, "z_dim": 2, "dim_mult": [1, 2, 2, 4], "num_res_blocks": 1,
        "temperal_downsample": [True, False, True],
    },
}  # fmt: skip


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter, norms and biases too, a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 4
        parameter.data = parameter.data.mean() * 0.5 + noise * (1.5 / fan_in**0.5)


def peer(name: str) -> Any:
    module = AutoencoderKLWan(**PEERS[name]).eval()
    randomise(module)
    return module


def video(frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@torch.no_grad()
def test_equals_diffusers(name: str, frames: int) -> None:
    theirs = peer(name)
    ours = vae_from_diffusers(theirs)
    x = video(frames, 16, 24, batch=2 if frames == 5 else 1)
    expected, found = theirs.encode(x).latent_dist, ours.encode(x)
    assert found.mean.std() > 0.05
    torch.testing.assert_close(found.mean, expected.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logvar, expected.logvar, atol=1e-4, rtol=0)
    pixels = theirs.decode(expected.mean).sample
    assert pixels.std() > 0.05
    torch.testing.assert_close(ours.decode(expected.mean).clamp(-1, 1), pixels, atol=1e-4, rtol=0)


@torch.no_grad()
def test_round_trip_through_diffusers() -> None:
    ours = VAE(TINY)
    randomise(ours)
    theirs: Any = vae_to_diffusers(ours, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    assert theirs.config.scale_factor_temporal == 2 and theirs.config.scale_factor_spatial == 2
    back = vae_from_diffusers(theirs)
    assert back.config == TINY
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    x = video(5, 8, 8)
    torch.testing.assert_close(
        ours.encode(x).mean, theirs.encode(x).latent_dist.mean, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("changed", [1, 4, 5, 8])
@torch.no_grad()
def test_causal(changed: int) -> None:
    """Pixel frame t reaches no latent before ⌈t/4⌉, and latent j no pixel before 4j − 3."""
    vae = vae_from_diffusers(peer("4x4x4, wider decoder"))
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


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_fast_paths_equal_the_plain_convolution(frames: int, stride: int) -> None:
    """One sample in fp32 takes other kernels; outputs and gradients must not change."""
    torch.manual_seed(frames)
    conv = CausalConv3d(3, 4, (3, 3, 3), time_stride=stride)
    x = torch.randn(1, 3, frames, 6, 5, requires_grad=True)
    padded = nn.functional.pad(x, (1, 1, 1, 1, 2, 0))
    expected = nn.functional.conv3d(padded, conv.weight, conv.bias, stride=(stride, 1, 1))
    found = conv(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(expected)
    inputs = [x, *conv.parameters()]
    a = torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True)
    b = torch.autograd.grad((found * weight).sum(), inputs)
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(right, left, atol=1e-4, rtol=1e-4)


def test_bf16_autocast_is_close_and_gradients_flow() -> None:
    vae = VAE(TINY)
    randomise(vae)
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


def test_fresh_vae_reconstructs_an_image_shape_and_learns() -> None:
    torch.manual_seed(0)
    vae = VAE(TINY)
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
    state["quant.bias"].view(-1)[0] += 1e-6
    assert vae_hash(state, TINY) != first


def test_strides() -> None:
    for mult, time, strides in (
        ((1, 2), (True,), (2, 2, 2)),
        ((1, 2, 2), (True, True), (4, 4, 4)),
        ((1, 2, 4, 4), (False, True, True), (4, 8, 8)),
    ):
        config = VAEConfig(8, 4, mult, time, 1)
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
    ],
)
def test_wrong_configs_are_refused(change: dict, rule: str) -> None:
    base = {
        "base_dim": 8, "z_dim": 4, "dim_mult": (1, 2), "temporal_downsample": (True,),
        "num_res_blocks": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=rule):
        VAEConfig(**{**base, **change})


def test_residual_generation_is_refused_by_name() -> None:
    module = AutoencoderKLWan(
        base_dim=4, z_dim=2, dim_mult=[1, 1], temperal_downsample=[True], is_residual=True
    )
    with pytest.raises(ValueError, match="is_residual"):
        vae_from_diffusers(module)
