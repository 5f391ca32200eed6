"""Colours and scaling against floating point."""

import io

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from longtake.data.decode import decode_clip
from tests.data.test_decode import psnr

# Red and blue weights of luma (ITU-T H.273, table 4).
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


def _scene(height: int, width: int) -> np.ndarray:
    """Smooth shapes, hard edges, fine stripes and noise, uint8 (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width] / height
    picture = np.stack(
        [128 + 100 * np.sin(9 * x + 4 * y), 128 + 90 * np.cos(7 * y), 255 * (x * y % 0.3 > 0.15)],
        axis=-1,
    )
    picture[height // 4 : height // 2, width // 4 : width // 2] = (220, 30, 60)
    picture[height // 2 :, width // 2 :] += 40 * np.sin(400 * x[height // 2 :, width // 2 :, None])
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 1))
    return (picture + noise).clip(0, 255).astype(np.uint8)


def _video(height: int, width: int, space: str, full: bool) -> bytes:
    buffer = io.BytesIO()
    matrix = {"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}[space]
    levels = ColorRange.JPEG if full else ColorRange.MPEG
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "12", "threads": "1", "preset": "ultrafast"}
        # Tags are AVColorSpace: 1 is BT.709, 6 is SMPTE 170M (BT.601).
        stream.codec_context.colorspace = 1 if space == "bt709" else 6
        stream.codec_context.color_range = levels
        frame = av.VideoFrame.from_ndarray(_scene(height, width), format="rgb24")
        yuv = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=levels)
        container.mux(stream.encode(yuv))
        container.mux(stream.encode())
    return buffer.getvalue()


def _doubled(plane: np.ndarray, axis: int, sited: bool) -> np.ndarray:
    """Linear interpolation of chroma: `sited` on every other luma sample, else between two."""
    size = plane.shape[axis]
    places = np.arange(2 * size) / 2 - (0 if sited else 0.25)
    low = np.clip(np.floor(places).astype(int), 0, size - 1)
    share = np.clip(places - low, 0, 1).reshape([-1 if a == axis else 1 for a in (0, 1)])
    above = np.take(plane, np.minimum(low + 1, size - 1), axis)
    return np.take(plane, low, axis) * (1 - share) + above * share


def reference(data: bytes, height: int, width: int, space: str, full: bool) -> np.ndarray:
    """The first frame in floating point: linear chroma, exact matrix, Lanczos with antialiasing."""
    with av.open(io.BytesIO(data), "r") as container:
        frame = next(container.decode(video=0))
    planes = [
        np.frombuffer(bytes(p), np.uint8).reshape(p.height, p.line_size)[:, : p.width].astype(float)
        for p in frame.planes
    ]
    luma = planes[0] if full else (planes[0] - 16) * 255 / 219
    scale = 1 if full else 255 / 224
    u, v = (scale * (_doubled(_doubled(c, 0, False), 1, True) - 128) for c in planes[1:])
    red, blue = WEIGHTS[space]
    r, b = luma + 2 * (1 - red) * v, luma + 2 * (1 - blue) * u
    g = (luma - red * r - blue * b) / (1 - red - blue)
    channels = [
        Image.fromarray(c.clip(0, 255).astype(np.float32)).resize(
            (width, height), Image.Resampling.LANCZOS
        )
        for c in (r, g, b)
    ]
    return np.stack([np.asarray(c) for c in channels], axis=-1).clip(0, 255)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", WEIGHTS)
@pytest.mark.parametrize("size", [(128, 228), (256, 456), (100, 101)])
def test_antialias_is_within_rounding_of_floating_point(
    space: str, full: bool, size: tuple[int, int]
) -> None:
    data = _video(720, 1280, space, full)
    exact = reference(data, *size, space, full)
    fine = psnr(decode_clip(data, [0.0], size=size, resize="antialias")[0], exact)
    fast = psnr(decode_clip(data, [0.0], size=size)[0], exact)
    print(f"{space} full={full} {size}: antialias {fine:.1f} dB, fast {fast:.1f} dB")
    assert fine >= 50 and fine > fast


def test_a_tag_for_colours_is_honoured() -> None:
    data = _video(128, 128, "bt709", False)
    wrong = reference(data, 128, 128, "bt601", False)
    frame = decode_clip(data, [0.0])[0]
    assert psnr(frame, reference(data, 128, 128, "bt709", False)) > 45 > psnr(frame, wrong) + 10


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_pictures_are_exact_at_their_own_size_and_faithful_at_others(mode: str) -> None:
    picture = Image.fromarray(_scene(384, 576)).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    rgb = picture.convert("RGB")
    assert np.array_equal(decode_clip(buffer.getvalue(), [0.0])[0], np.asarray(rgb))
    small = decode_clip(buffer.getvalue(), [0.0], size=(128, 192), resize="antialias")[0]
    assert psnr(small, np.asarray(rgb.resize((192, 128), Image.Resampling.LANCZOS))) >= 50


def test_an_unknown_resize_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.resize='sharp' must be one of fast, antialias"):
        decode_clip(b"", [0.0], resize="sharp")
