"""Chunks equal one pass, memory does not grow with length, tiles blend, and bad input is named."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from longtake.models.vae import VAE, Posterior
from longtake.models.vae_conv import Stream
from longtake.models.vae_streaming import (
    Tiling,
    stream_decode,
    stream_encode,
    tiled_decode,
    tiled_encode,
)
from tests.models.small_vaes import CONFIGS, TINY, make_vae, video


def join(posteriors: Iterator[Posterior]) -> Posterior:
    parts = list(posteriors)
    return Posterior(
        torch.cat([part.mean for part in parts], dim=2),
        torch.cat([part.logvar for part in parts], dim=2),
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [(1, 4, 4, 4, 4), (5, 12), (1, 16), (2, 1, 6, 8), (17,)])
@torch.no_grad()
def test_encoding_in_chunks_equals_one_pass(name: str, lengths: tuple[int, ...]) -> None:
    vae = make_vae(CONFIGS[name])
    x = video(17, 8, 16, batch=2)
    expected, found = vae.encode(x), join(stream_encode(vae, x.split(lengths, dim=2)))
    torch.testing.assert_close(found.mean, expected.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logvar, expected.logvar, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 1), (2, 3), (1, 4), (5,)])
@torch.no_grad()
def test_decoding_in_chunks_equals_one_pass(name: str, lengths: tuple[int, ...]) -> None:
    vae = make_vae(CONFIGS[name])
    z = torch.randn(1, vae.config.z_dim, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    parts = list(stream_decode(vae, z.split(lengths, dim=2)))
    time = vae.strides[0]
    assert [part.shape[2] for part in parts] == [
        time * length - (time - 1) * (index == 0) for index, length in enumerate(lengths)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), vae.decode(z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_stream_keeps_does_not_grow(name: str) -> None:
    vae = make_vae(CONFIGS[name])
    encoding, decoding = Stream(), Stream()
    kept = []
    with torch.no_grad():
        for index in range(6):
            z = vae.encode(video(1 if index == 0 else 4, 8, 8), encoding).mean
            vae.decode(z, decoding)
            tensors = [*encoding._last.values(), *decoding._last.values()]
            kept.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert kept[0] < kept[2] == kept[5]


LONG = """
import resource, sys
import torch
from longtake.models.vae_streaming import stream_decode, stream_encode
from longtake.models.vae_config import VAEConfig
from tests.models.small_vaes import make_vae

torch.set_num_threads(1)
vae = make_vae(VAEConfig(16, 8, (1, 2, 2, 2), (False, True, True), 1))

def chunks():
    for index in range(251):
        if index == 25:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # kB, after 97 frames
        yield torch.rand(1, 3, 1 if index == 0 else 4, 64, 64) * 2 - 1

latents = (posterior.mean for posterior in stream_encode(vae, chunks()))
print(sum(pixels.shape[2] for pixels in stream_decode(vae, latents)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_thousand_frames_take_the_memory_of_a_hundred() -> None:
    """1,001 frames of 64×64, encoded and decoded; in one piece the pixels alone weigh 49 MB."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    before, frames, after = map(int, done.stdout.split())
    print(
        f"peak memory: {before / 1e3:.1f} MB after 97 frames, {after / 1e3:.1f} MB after {frames}"
    )
    assert frames == 1001
    assert after - before < 4e3


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_one_tile_over_the_frame_is_exact(name: str) -> None:
    vae = make_vae(CONFIGS[name])
    x = video(5, 16, 24)
    tiling = Tiling(size=24, overlap=8)
    assert torch.equal(tiled_encode(vae, x, tiling).mean, vae.encode(x).mean)
    z = vae.encode(x).mean
    assert torch.equal(tiled_decode(vae, z, tiling), vae.decode(z))


@torch.no_grad()
def test_tiles_fade_into_each_other() -> None:
    """12×12 latents as 2×2 tiles of 8 that share 4: there each weighs 4/5, 3/5, 2/5, 1/5."""
    vae = make_vae(TINY)
    x = video(3, 24, 24)
    tiling, cuts = Tiling(size=16, overlap=8), [slice(0, 8), slice(4, 12)]
    assert tiling.cuts(12, stride=2) == cuts
    coarse = torch.tensor([1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    fine = torch.tensor([1] * 8 + [k / 9 for k in range(8, 0, -1)])
    z = vae.encode(x).mean
    latents, pixels = torch.zeros_like(z), torch.zeros_like(x)
    for i, j in product((0, 1), (0, 1)):
        weight, wide = (
            (ramp, ramp.flip(0))[i][:, None] * (ramp, ramp.flip(0))[j] for ramp in (coarse, fine)
        )
        here = (..., cuts[i], cuts[j])
        there = (..., *(slice(2 * cuts[k].start, 2 * cuts[k].stop) for k in (i, j)))
        latents[here] += weight * vae.encode(x[there]).mean
        pixels[there] += wide * vae.decode(z[here])
    torch.testing.assert_close(tiled_encode(vae, x, tiling).mean, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiled_decode(vae, z, tiling), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "overlap"), [(8, 4), (8, 0), (8, 7), (10, 2)])
def test_tiles_cover_the_frame_and_share_the_overlap(size: int, overlap: int) -> None:
    tiling = Tiling(size, overlap)
    assert tiling.cuts(size, stride=1) == [slice(0, size)]
    for length in range(size + 1, 60):
        cuts = tiling.cuts(length, stride=1)
        assert cuts[0].start == 0 and cuts[-1].stop == length
        assert all(overlap < cut.stop - cut.start <= size for cut in cuts)
        assert all(a.stop - b.start == overlap for a, b in pairwise(cuts))


@pytest.mark.parametrize("name", ["tiny 2x2x2", "residual 4x8x8"])
@torch.no_grad()
def test_tiles_in_chunks_equal_tiles_in_one_pass(name: str) -> None:
    vae = make_vae(CONFIGS[name])
    x = video(9, 32, 48)
    tiling = Tiling(size=24, overlap=8)
    expected = tiled_encode(vae, x, tiling).mean
    found = join(stream_encode(vae, x.split(3, dim=2), tiling)).mean
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    pixels = list(stream_decode(vae, expected.split(1, dim=2), tiling))
    whole = tiled_decode(vae, expected, tiling)
    torch.testing.assert_close(torch.cat(pixels, dim=2), whole, atol=1e-5, rtol=0)
    assert whole.shape == x.shape


def damaged() -> Tensor:
    x = video(3, 8, 8, batch=2)
    x[1, 0, 1, 4, 4] = torch.nan
    return x


@pytest.mark.parametrize(
    ("chunks", "rule"),
    [
        ([video(1, 8, 8, 2), damaged()], "sample 1 .* not finite in frame 2"),
        ([video(1, 8, 8), video(3, 8, 8)], "clip of 4 frames: the VAE needs 1 \\+ 2·k; use 3"),
        ([video(1, 8, 8), video(2, 8, 6)], "\\(1, 8, 6\\), the clip began with \\(1, 8, 8\\)"),
        ([video(1, 8, 7)], "8x7 pixels: both must be multiples of 2"),
        ([video(1, 8, 8)[:, :2]], "expected \\(B, 3, T, H, W\\)"),
        ([video(1, 8, 8)[0]], "expected \\(B, 3, T, H, W\\)"),
        ([], "clip of 0 frames"),
    ],
)
def test_wrong_clips_are_refused(chunks: list[Tensor], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        list(stream_encode(VAE(TINY), chunks))


def test_a_tiled_clip_of_a_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="clip of 4 frames"):
        tiled_encode(VAE(TINY), video(4, 8, 8), Tiling(8, 0))


@pytest.mark.parametrize(
    ("latents", "rule"),
    [
        (torch.zeros(1, 3, 1, 4, 4), "latents of shape .* expected \\(B, 4, T, H, W\\)"),
        (torch.full((1, 4, 1, 4, 4), torch.inf), "latents: sample 0 .* not finite in frame 0"),
    ],
)
def test_wrong_latents_are_refused(latents: Tensor, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        list(stream_decode(VAE(TINY), [latents]))


def test_wrong_chunks_and_tiles_are_refused() -> None:
    vae, stream = VAE(TINY), Stream()
    with torch.no_grad():
        vae.encode(video(1, 8, 8), stream)
    with pytest.raises(ValueError, match="chunk of 3 frames: after the first, 2·k is needed"):
        vae.encode(video(3, 8, 8), stream)
    with pytest.raises(ValueError, match="overlap=8: the overlap must be smaller"):
        Tiling(size=8, overlap=8)
    with pytest.raises(ValueError, match="multiples of 2, the VAE's stride"):
        tiled_encode(vae, video(1, 8, 8), Tiling(size=7, overlap=2))
