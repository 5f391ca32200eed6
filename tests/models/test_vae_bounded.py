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


@pytest.mark.parametrize("frames_at_once", [1, 40])
def test_values_that_are_not_finite_are_refused_at_any_size(frames_at_once: int) -> None:
    vae = make_vae(CONFIGS["4x4x4"])
    x, z = video(17, 16, 16, batch=3), torch.randn(3, 3, 5, 4, 4)
    x[1, 0, 6, 3, 2] = torch.nan
    z[2, 1, 4, 0, 0] = -torch.inf
    said = "sample {} has values that are not finite in frame {}, and all must be"
    with pytest.raises(ValueError, match="video: " + said.format(1, 6)):
        encode_bounded(vae, x, frames_at_once * FRAME)
    with pytest.raises(ValueError, match="latents: " + said.format(2, 4)):
        decode_bounded(vae, z, frames_at_once * FRAME)
    with pytest.raises(ValueError, match=r"video of shape \(3, 4, 17, 16, 16\): expected"):
        encode_bounded(vae, torch.cat((x, x[:, :1]), 1))


def test_a_training_pass_does_not_wait_to_look_at_values(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, x, noise = make_vae(CONFIGS["4x4x4"]), video(5, 16, 16), torch.zeros(1, 3, 2, 4, 4)

    def refuse(_: Tensor) -> None:
        raise AssertionError("waits for the device")

    for name in ("__bool__", "item", "tolist"):
        monkeypatch.setattr(Tensor, name, refuse)
    vae(x, noise)
    with pytest.raises(AssertionError, match="waits"):
        encode_bounded(vae, x)


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
