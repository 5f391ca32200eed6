"""Files that lie or are damaged: each is refused with its reason, in bounded time and memory."""

import io
import re
import resource
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from longtake.data.decode import DecodeError, HeaderLimits, decode_clip, encode_image, probe
from tests.data.test_decode_formats import write
from tests.data.toy import toy_frames, toy_video


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A quarter of a gigabyte of memory more than before, at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


def _refused(data: bytes, reason: str) -> None:
    for read in (probe, lambda d: decode_clip(d, [0.0])):
        with pytest.raises(DecodeError, match=reason):
            read(data)


def _patched(data: bytes, box: bytes, offset: int, form: str, *values: float) -> bytes:
    """`data` with numbers overwritten `offset` bytes behind the name of its last such box."""
    at = data.rindex(box) + 4 + offset
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def test_a_header_that_claims_16k_frames() -> None:
    data = toy_video(0)
    _refused(_patched(data, b"avc1", 24, ">HH", 16384, 16384), "16384x16384 is over the limit")
    _refused(_patched(data, b"avc1", 24, ">HH", 60000, 1), "60000x1 is over the limit")


def test_a_codec_that_has_larger_frames_than_the_header() -> None:
    data = write("libx264", "yuv420p", "mp4", {}, count=2, size=(256, 512))
    lying = _patched(data, b"avc1", 24, ">HH", 32, 32)
    info = probe(lying)
    assert (info.height, info.width) == (32, 64), "no frame is decoded to find out"
    with pytest.raises(DecodeError, match=r"over the limit|damaged"):
        decode_clip(lying, [0.0], limits=HeaderLimits(max_pixels=64 * 64))
    with pytest.raises(DecodeError, match="512x256 is over the limit"):
        decode_clip(lying, [0.0], limits=HeaderLimits(max_side=300))
    for decoder in ("pyav", "decord"):
        with pytest.raises(DecodeError, match="on display, the header promised 64x32"):
            decode_clip(lying, [0.0], decoder=decoder, frame_size=(32, 64), size=(16, 32))


@pytest.mark.parametrize("count", [10**6, 2 * 10**6, 2**31])
def test_a_claim_of_a_million_frames(count: int) -> None:
    data = _patched(toy_video(0), b"stts", 8, ">I", count)
    data = _patched(data, b"stsz", 8, ">I", count)
    _refused(data, r"truncated|more than|damaged|no frame size|no frames")


def _avi_with_rate(scale: int, rate: int) -> bytes:
    data = write("mpeg4", "yuv420p", "avi", {}, count=4)
    return _patched(data, b"strh", 4 + 20, "<II", scale, rate)


@pytest.mark.parametrize(("scale", "rate"), [(0, 0), (1, 0), (0, 1), (2**32 - 1, 1)])
def test_rates_of_zero_and_infinity_are_finite_or_refused(scale: int, rate: int) -> None:
    try:
        info = probe(_avi_with_rate(scale, rate))
    except DecodeError:
        return
    for value in (info.fps, info.duration, info.keyframe_interval, info.start_time):
        assert np.isfinite(value) and value >= 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, 1e300])
def test_a_matroska_that_claims_a_nonsense_duration(value: float) -> None:
    data = write("libx264", "yuv420p", "matroska", {}, count=4)
    at = data.index(b"\x44\x89\x88") + 3  # Duration, a float of 8 bytes
    patched = data[:at] + struct.pack(">d", value) + data[at + 8 :]
    try:
        info = probe(patched)
    except DecodeError as error:
        assert re.search("truncated|damaged", str(error))
        return
    assert info.frames == 4 and np.isfinite(info.fps) and 0 < info.duration < 1


def test_times_that_are_no_numbers() -> None:
    for bad in (float("nan"), float("inf"), -float("inf"), 1e18):
        with pytest.raises(DecodeError, match="were asked for"):
            decode_clip(toy_video(0), [0.0, bad])


def test_nothing_and_a_video_of_one_frame() -> None:
    _refused(b"", "empty file")
    data = write("libx264", "yuv420p", "mp4", {}, count=1)
    info = probe(data)
    assert info.frames == 1 and info.duration > 0 and np.isfinite(info.fps)
    assert decode_clip(data, [0.0]).shape == (1, 48, 64, 3)


def test_sound_alone_and_sound_with_a_cover() -> None:
    for with_cover in (False, True):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            sound = container.add_stream("aac", rate=48000)
            if with_cover:
                cover = container.add_stream("mjpeg", rate=25)
                cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
                cover.disposition = Disposition.attached_pic
                picture = av.VideoFrame(64, 64, "yuvj420p")
                container.mux(cover.encode(picture))
                container.mux(cover.encode())
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 48000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
        _refused(buffer.getvalue(), "no video stream")


def test_an_unknown_codec_is_named_as_such() -> None:
    _refused(toy_video(0).replace(b"avc1", b"zzz9"), "no decoder for its codec|no video stream")


def test_frames_that_change_their_size() -> None:
    one, two = (
        write("libx264", "yuv420p", "h264", {"x264-params": "repeat-headers=1"}, count=5, size=size)
        for size in ((48, 64), (64, 64))
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = None
        for part, raw in enumerate((one, two)):
            with av.open(io.BytesIO(raw), "r", format="h264") as source:
                video = source.streams.video[0]
                stream = stream or out.add_stream_from_template(video)
                number = 0
                for packet in source.demux(video):
                    if packet.size:
                        packet.stream = stream
                        packet.pts = packet.dts = 40 * (5 * part + number)
                        packet.time_base = Fraction(1, 1000)
                        number += 1
                        out.mux(packet)
    times = [0.0, 0.3]
    for size in (None, (32, 32)):
        with pytest.raises(DecodeError, match=r"frame size changes|cannot be decoded"):
            decode_clip(buffer.getvalue(), times, size=size)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_damaged_in_the_middle(progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", progressive=progressive)
    data = bytearray(buffer.getvalue())
    middle = len(data) // 2
    data[middle : middle + 200] = b"\xff\x00" * 100
    _refused(bytes(data), r"damaged")


def test_a_picture_that_unpacks_to_gigabytes() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    zeros = zlib.compressobj(9)
    body = b"".join(zeros.compress(bytes(2**20)) for _ in range(64)) + zeros.flush()
    for side in (16384, 2**20, 2**31 - 1):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
        _refused(data, "damaged, or over the limit|over the limit|damaged")


def test_pixels_of_an_absurd_shape() -> None:
    data = write("libx264", "yuv420p", "mp4", {}, count=2, sample_aspect_ratio=Fraction(4, 3))
    for wide, high in ((999, 1), (1, 999)):
        _refused(_patched(data, b"pasp", 0, ">II", wide, high), "over the limit|no frame size")


def test_a_damaged_picture_in_the_middle_is_no_grey_frame() -> None:
    data = encode_image(toy_frames(0)[0])
    middle = data.index(b"IDAT") + 30
    _refused(data[:middle] + b"\0" * 40 + data[middle + 40 :], "damaged")
