"""The VAE computes what diffusers' AutoencoderKLWan computes, and weights go both ways."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from longtake.models.interop import vae_config_from_diffusers, vae_from_diffusers, vae_to_diffusers
from longtake.models.vae_config import VAEConfig
from tests.models.small_vaes import CONFIGS, make_vae, randomise, video

PEERS = {
    "4x8x8, as Wan 2.1": {
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
    "4x8x8, time first": {
        "base_dim": 4, "z_dim": 2, "dim_mult": [1, 2, 2, 4], "num_res_blocks": 1,
        "temperal_downsample": [True, False, True],
    },
    "4x16x16, as Wan 2.2": {
        "base_dim": 8, "decoder_base_dim": 12, "z_dim": 6, "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2, "temperal_downsample": [False, True, True], "is_residual": True,
        "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
    },
    "residual 2x4x4, no patches": {
        "base_dim": 6, "z_dim": 3, "dim_mult": [2, 4, 4], "num_res_blocks": 1,
        "temperal_downsample": [True, False], "is_residual": True,
    },
    "residual 4x8x8, narrower at the latents": {
        "base_dim": 4, "decoder_base_dim": 8, "z_dim": 3, "dim_mult": [2, 2, 1],
        "num_res_blocks": 1, "temperal_downsample": [True, True], "is_residual": True,
        "patch_size": 2, "in_channels": 12, "out_channels": 12,
    },
}  # fmt: skip


def peer(name: str) -> Any:
    module = AutoencoderKLWan(**PEERS[name]).eval()
    randomise(module)
    return module


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("frames", [1, 5, 17, 33])
@torch.no_grad()
def test_equal_moments_and_pixels(name: str, frames: int) -> None:
    theirs = peer(name)
    ours = vae_from_diffusers(theirs)
    space = ours.strides[1]
    x = video(frames, space, 2 * space, batch=2 if frames == 5 else 1)
    expected, found = theirs.encode(x).latent_dist, ours.encode(x)
    assert found.mean.std() > 0.05
    torch.testing.assert_close(found.mean, expected.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logvar, expected.logvar, atol=1e-4, rtol=0)
    pixels = theirs.decode(expected.mean).sample
    assert pixels.std() > 0.05
    torch.testing.assert_close(ours.decode(expected.mean).clamp(-1, 1), pixels, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(config: VAEConfig) -> None:
    ours = make_vae(config)
    theirs: Any = vae_to_diffusers(
        ours, latents_mean=[0.5] * config.z_dim, latents_std=[2.0] * config.z_dim
    )
    assert theirs.config.scale_factor_temporal == ours.strides[0]
    assert theirs.config.scale_factor_spatial == ours.strides[1]
    assert theirs.config.latents_std == [2.0] * config.z_dim
    back = vae_from_diffusers(theirs)
    assert back.config == config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"attn_scales": [0.5]}, "attn_scales=\\[0.5\\]"),
        ({"patch_size": 2}, "in_channels=3: it must be a multiple of patch_size² = 4"),
        ({"dim_mult": [1] * 4, "temperal_downsample": [True] * 3}, "at most twice"),
    ],
)
def test_what_the_peer_cannot_run_is_refused(change: dict, rule: str) -> None:
    config = AutoencoderKLWan(**PEERS["2x2x2"]).config
    with pytest.raises(ValueError, match=rule):
        vae_config_from_diffusers({**config, **change})


def test_weights_of_another_architecture_are_refused() -> None:
    module = peer("2x2x2")
    del module.decoder.norm_out.gamma
    with pytest.raises(ValueError, match=r"decoder\.norm_out\.gamma is missing"):
        vae_from_diffusers(module)
