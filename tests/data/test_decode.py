import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
from PIL import Image

from longtake.data.decode import (
    DecodeError,
    HeaderLimits,
    decode_clip,
    encode_image,
    encode_video,
    probe,
)
from tests.data.toy import toy_frames, toy_video


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(float) - two) ** 2), 1e-9)))


def _numbered(count: int) -> np.ndarray:
    """Frame i has grey level 20 + 4 i, so that a decoded frame tells its number."""
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None] * 4 + 20
    return np.broadcast_to(levels, (count, 32, 32, 3)).copy()


def _numbers(frames: np.ndarray) -> list[int]:
    return np.round((frames.mean(axis=(1, 2, 3)) - 20) / 4).astype(int).tolist()


def _mux(pts: list[int], time_base: Fraction, form: str = "matroska", **options: str) -> bytes:
    """A video whose i-th frame has time stamp pts[i]."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv444p"
        stream.codec_context.time_base = time_base
        stream.options = {"crf": "1", "threads": "1", **options}
        for time, array in zip(pts, _numbered(len(pts)), strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(("side", "frames"), [(16, 1), (16, 8), (32, 17), (64, 9), (128, 5)])
def test_round_trip_at_40_db_and_equal_bytes(side: int, frames: int) -> None:
    clip = toy_frames(1, frames, side, side)
    noise = np.random.default_rng(0).integers(-12, 13, (side, side, 1))
    clip = np.clip(clip + noise, 0, 255).astype(np.uint8)
    data = encode_video(clip, 8)
    assert data == encode_video(clip, 8)
    decoded = decode_clip(data, [i / 8 for i in range(frames)])
    assert decoded.shape == clip.shape and decoded.dtype == np.uint8
    assert psnr(clip, decoded) >= 40


def test_probe_reads_the_header() -> None:
    info = probe(encode_video(toy_frames(0, 25, 48, 64), 30000 / 1001, gop=5))
    assert (info.frames, info.height, info.width, info.codec) == (25, 48, 64, "h264")
    assert info.fps == pytest.approx(30000 / 1001)
    assert info.duration == pytest.approx(25 * 1001 / 30000, abs=1e-3)
    assert info.keyframe_interval == pytest.approx(5 * 1001 / 30000, rel=0.01)
    assert info.start_time == 0


def test_images_are_clips_of_one_frame() -> None:
    frame = toy_frames(0)[0]
    data = encode_image(frame)
    info = probe(data)
    assert (info.frames, info.fps, info.duration, info.codec) == (1, 0, 0, "png")
    assert np.array_equal(decode_clip(data, [0.0])[0], frame)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_frames_are_chosen_by_presentation_time(decoder: str) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    data = encode_video(_numbered(40), 10, gop=7)
    times = [0.0, 0.1, 0.149, 0.199, 1.55, 3.9, 3.99]
    assert _numbers(decode_clip(data, times, decoder=decoder)) == [0, 1, 1, 1 + 1, 15, 39, 39]


def test_times_need_no_order_and_may_repeat() -> None:
    data = encode_video(_numbered(20), 10, gop=5)
    assert _numbers(decode_clip(data, [1.5, 0.2, 1.5, 0.0])) == [15, 2, 15, 0]


def test_variable_frame_rate_and_late_start() -> None:
    pts = [1000, 1100, 1500, 1550, 1600, 3000]  # ms
    data = _mux(pts, Fraction(1, 1000))
    info = probe(data)
    assert info.frames == 6 and info.start_time == pytest.approx(1.0)
    assert _numbers(decode_clip(data, [0, 0.05, 0.1, 0.45, 0.56, 0.6, 1.9, 2.0])) == [
        0, 0, 1, 1, 3, 4, 4, 5,
    ]  # fmt: skip


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("frames", [range(24), range(18, 24), range(13, 15)])
def test_avi_with_b_frames_keeps_their_order(decoder: str, frames: range) -> None:
    """AVI has no presentation times, and the ones that FFmpeg makes up follow decoding order."""
    data = _avi(list(range(24)), "libx264", 3)
    times = [index / 24 for index in frames]
    assert _numbers(decode_clip(data, times, decoder=decoder)) == list(frames)


def _avi(pts: list[int], codec: Literal["libx264", "mpeg4"], b_frames: int) -> bytes:
    """Numbered frames at 24 fps; gaps in `pts` become dropped frames, chunks of no bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        options = {"g": "12", "bf": str(b_frames), "b-pyramid": "none"}
        if codec == "mpeg4":
            options = {"g": "12", "flags": "+qscale", "global_quality": "118"}
        stream = container.add_stream(codec, rate=24, options=options)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.max_b_frames = "yuv420p", b_frames
        for time, array in zip(pts, _numbered(len(pts)), strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_dropped_frames_of_an_avi_are_no_truncation() -> None:
    data = _avi([*range(12), *range(24, 36)], "mpeg4", 0)
    assert (probe(data).frames, probe(data).duration) == (24, 1.5)
    shown = _numbers(decode_clip(data, [i / 24 for i in range(36)]))
    assert shown == [*range(12), *[11] * 12, *range(12, 24)]
    for share in (0.3, 0.6, 0.9, 0.99):
        with pytest.raises(DecodeError):
            probe(data[: int(len(data) * share)])


@pytest.mark.parametrize("options", [{"movflags": "+faststart"}, {}])
def test_an_edit_list_may_end_early_but_no_file_may(
    tmp_path: Path, options: dict[str, str]
) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=24, options={"g": "6", "bf": "2"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for array in np.random.default_rng(0).integers(0, 255, (24, 32, 32, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    whole = decode_clip(bytes(data), [i / 24 for i in range(12)])
    at = data.index(b"elst") + 12
    (length,) = struct.unpack(">I", data[at : at + 4])
    data[at : at + 4] = struct.pack(">I", length // 2)
    info = probe(bytes(data))
    assert 12 <= info.frames < 24
    assert np.array_equal(decode_clip(bytes(data), [i / 24 for i in range(12)]), whole)
    start = data.index(b"mdat") - 4
    (size,) = struct.unpack(">I", data[start : start + 4])
    for cut in [*range(start, start + size, size // 40), start + 4, start + 7, start + size - 1]:
        with pytest.raises(DecodeError):
            probe(bytes(data[:cut]))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_is_an_error(progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    picture.save(buffer, "JPEG", progressive=progressive, exif=b"Exif\0\0thumb\xff\xd9nail")
    data = buffer.getvalue()
    assert decode_clip(data, [0.0]).shape == (1, 64, 64, 3)
    assert probe(data + b"\xff\xda trailing").width == 64
    for size in range(3, len(data) - 1, len(data) // 50):
        with pytest.raises(DecodeError, match="truncated"):
            probe(data[:size])


def test_every_start_works_with_open_groups_of_pictures() -> None:
    pts = list(range(50))
    data = _mux(pts, Fraction(1, 25), "mp4", bf="3", g="10", **{"x264-params": "open-gop=1"})
    for start in range(46):
        times = [(start + i) / 25 for i in range(4)]
        assert _numbers(decode_clip(data, times)) == [start, start + 1, start + 2, start + 3]


def test_times_outside_the_clip_are_errors() -> None:
    data = toy_video(0, 9)
    for times in ([0.0, 1.2], [-0.1]):
        with pytest.raises(DecodeError, match=r"clip lasts 1\.125 s"):
            decode_clip(data, times)


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_a_truncated_file_is_an_error_and_never_a_part(form: str) -> None:
    data = _mux(list(range(60)), Fraction(1, 30), form, g="5")
    times = [i / 30 for i in range(60)]
    whole = decode_clip(data, times)
    outcomes = {"error": 0, "whole": 0}
    for size in range(0, len(data), max(1, len(data) // 60)):
        try:
            frames = decode_clip(data[:size], times)
        except DecodeError:
            outcomes["error"] += 1
        else:
            assert np.array_equal(frames, whole)
            outcomes["whole"] += 1
    assert outcomes["error"] >= 55


def test_a_truncated_fast_start_mp4_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "fast.mp4"
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for array in np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")
    assert probe(data).frames == 30
    for share in (0.5, 0.8, 0.97):
        with pytest.raises(DecodeError, match=r"truncated|damaged"):
            probe(data[: int(len(data) * share)])


def test_flipped_bytes_raise_nothing_but_decode_errors() -> None:
    data = toy_video(0, 9)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            damaged[position] = rng.integers(0, 256)
        try:
            probe(bytes(damaged))
            frames = decode_clip(bytes(damaged), [0.0, 0.5], size=(32, 32))
            assert frames.shape == (2, 32, 32, 3)
        except DecodeError:
            pass


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"#EXTM3U\n", b"ffconcat version 1.0\n", b"a"])
def test_foreign_bytes_are_errors(data: bytes) -> None:
    with pytest.raises(DecodeError, match=r"empty file|unknown container"):
        probe(data)


def _png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    )
    data = zlib.compress(b"\0" * 64)
    chunk = b"IDAT" + data
    return start + struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_header_limits_are_checked_before_decoding() -> None:
    with pytest.raises(DecodeError, match=r"over the limit|damaged"):
        probe(_png_header(16384, 16384))
    video = toy_video(0, 9, 32, 64)
    with pytest.raises(DecodeError, match="64x32 is over the limit"):
        probe(video, limits=HeaderLimits(max_side=48))
    with pytest.raises(DecodeError, match=r"over the limit|damaged"):
        decode_clip(video, [0.0], limits=HeaderLimits(max_pixels=1024))
    with pytest.raises(DecodeError, match="more than 5 frames"):
        probe(video, limits=HeaderLimits(max_frames=5))


def test_audio_only_has_no_video_stream() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DecodeError, match="no video stream"):
        probe(buffer.getvalue())


def test_decoders_are_named_and_decord_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data\.decoder='opencv' must be one of"):
        decode_clip(toy_video(0), [0.0], decoder="opencv")
    import sys

    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ValueError, match=r"data\.decoder=decord: decord is not installed"):
        decode_clip(toy_video(0), [0.0], decoder="decord")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 8, 32, 3), "sides >= 16"), ((2, 32, 32), "must be uint8"), ((0, 32, 32, 3), "T >= 1")],
)
def test_frames_that_cannot_be_encoded(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_video(np.zeros(shape, np.uint8), 8)
    with pytest.raises(ValueError, match="fps=nan"):
        encode_video(np.zeros((1, 16, 16, 3), np.uint8), float("nan"))


def test_both_decoders_agree_on_real_clips(real_clips: Path) -> None:
    pytest.importorskip("decord")
    names = ("bikes", "carphone_pristine", "kitten", "h265_video", "nasa_13013")
    paths = [real_clips / f"{name}.mp4" for name in names]
    for path in paths if paths[0].exists() else sorted(real_clips.glob("*.mp4")):
        data = path.read_bytes()
        info = probe(data)
        times = (np.linspace(0.3, 0.8, 4) * info.duration).tolist()
        one = decode_clip(data, times, decoder="pyav")
        two = decode_clip(data, times, decoder="decord")
        assert one.shape == two.shape == (4, info.height, info.width, 3)
        # Chroma is interpolated otherwise; a neighbouring frame would give 27 dB at most.
        assert psnr(one, two) > 32, path.name


def test_real_clips_of_every_codec(real_clips: Path) -> None:
    codecs = set()
    for path in sorted(real_clips.glob("*.m*")):
        data = path.read_bytes()
        info = probe(data)
        codecs.add(info.codec)
        last = info.duration - 0.5 / info.fps
        clip = decode_clip(data, [0.0, last / 2, last], size=(36, 64))
        assert clip.shape == (3, 36, 64, 3) and clip.std() > 1
    is_real = (real_clips / "av1_video.mkv").exists()
    assert codecs == ({"h264", "hevc", "av1"} if is_real else {"h264"})
