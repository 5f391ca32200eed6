"""Bounded passes compute what one pass does, and no pass takes more than it may."""

import pytest
import torch
from torch import Tensor

from longtake.models.vae import VAE
from longtake.models.vae_bounded import decode_bounded, encode_bounded
from longtake.models.vae_streaming import Tiling, tiled_decode
from tests.models.small_vaes import CONFIGS, make_vae, video

FRAME = 4 * 10 * 16 * 16  # bytes of a frame of 16×16 at 10 channels, the most of config 4x4x4


@pytest.mark.parametrize("frames_at_once", [1, 6, 40])
@torch.no_grad()
def test_bounded_passes_equal_one_pass(
    frames_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = make_vae(CONFIGS["4x4x4"])
    x = video(17, 16, 16, batch=3)
    expected = vae.encode(x)
    pixels = vae.decode(expected.mean)
    sizes = record(vae, monkeypatch)
    found = encode_bounded(vae, x, frames_at_once * FRAME)
    assert max(sizes) <= max(frames_at_once, 4)  # no less than the frames of a latent
    torch.testing.assert_close(found.mean, expected.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logvar, expected.logvar, atol=1e-5, rtol=0)
    sizes.clear()
    whole = decode_bounded(vae, expected.mean, max(frames_at_once, 4) * FRAME)
    assert max(sizes) <= max(frames_at_once, 4)
    torch.testing.assert_close(whole, pixels, atol=1e-5, rtol=0)


@torch.no_grad()
def test_frames_that_are_too_large_are_decoded_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = make_vae(CONFIGS["4x4x4"])
    z = torch.randn(2, 3, 2, 12, 8)
    expected = tiled_decode(vae, z, Tiling(16, 4))
    sizes = record(vae, monkeypatch)
    found = decode_bounded(vae, z, 4 * FRAME)  # a latent of 48×32 pixels has six times as much
    assert max(sizes) <= 4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def record(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pixels of every later pass, in frames of 16×16."""
    sizes: list[float] = []
    encode, decode = vae.encode, vae.decode

    def note_encode(x: Tensor, *rest: object) -> object:
        sizes.append(x[:, 0].numel() / 256)
        return encode(x, *rest)  # type: ignore[arg-type]

    def note_decode(z: Tensor, *rest: object) -> object:
        y = decode(z, *rest)  # type: ignore[arg-type]
        sizes.append(y[:, 0].numel() / 256)
        return y

    monkeypatch.setattr(vae, "encode", note_encode)
    monkeypatch.setattr(vae, "decode", note_decode)
    return sizes
