"""The image-conditioned form takes the channels that the stock pipeline lays out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

from longtake.models.image_condition import image_condition
from longtake.models.interop import vae_to_diffusers
from tests.models.small_vaes import CONFIGS, make_vae, video


@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_equals_the_stock_pipeline(last: bool) -> None:
    vae = make_vae(CONFIGS["4x4x4"])
    mean, std = [0.3, -0.2, 0.1], [1.5, 0.5, 2.0]
    stock = SimpleNamespace(
        vae=vae_to_diffusers(vae, latents_mean=mean, latents_std=std),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=4,
        config=SimpleNamespace(expand_timesteps=False),
    )
    clip = video(9, 8, 12)
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    if last:
        options["last_image"] = clip[:, :, -1]
    _, expected = WanImageToVideoPipeline.prepare_latents(
        stock,  # pyright: ignore[reportArgumentType]
        clip[:, :, 0],
        batch_size=1,
        num_channels_latents=3,
        height=8,
        width=12,
        num_frames=9,
        **options,
    )

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        center, scale = (torch.tensor(values).view(-1, 1, 1, 1) for values in (mean, std))
        return (vae.encode(pixels).mean - center) / scale

    given = torch.zeros(1, 9, dtype=torch.bool)
    given[:, 0], given[:, -1] = True, last
    found = image_condition(clip, given, encode, time_stride=4)
    assert found.shape == (1, 4 + 3, 3, 2, 3)
    assert found[:, :4].sum() == 6 * (4 + last)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
