"""Odd files: codecs, geometry, rates, streams. Every frame against a plain decode of the whole."""

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import Interpolation
from PIL import Image

from longtake.data.decode import DecodeError, decode_clip, iter_frames, probe, source, with_pyav
from tests.data.test_decode import psnr

CODECS = {
    "h264": ("libx264", "yuv420p", "mp4", {"g": "12", "bf": "3"}),
    "h264 open groups": ("libx264", "yuv420p", "mp4", {"g": "12", "x264-params": "open-gop=1"}),
    "h264 pyramid mkv": ("libx264", "yuv420p", "matroska", {"g": "12", "x264-params": "ref=5"}),
    "h264 interlaced": ("libx264", "yuv420p", "mp4", {"g": "12", "x264-params": "tff=1"}),
    "h264 refresh": ("libx264", "yuv420p", "mp4", {"g": "12", "x264-params": "intra-refresh=1"}),
    "hevc": ("libx265", "yuv420p", "mp4", {"x265-params": "log-level=none:keyint=12:bframes=4"}),
    "hevc 10 bit": ("libx265", "yuv420p10le", "mp4", {"x265-params": "log-level=none:keyint=12"}),
    "vp9": ("libvpx-vp9", "yuv420p", "webm", {"g": "12", "cpu-used": "8", "auto-alt-ref": "1"}),
    "vp8": ("libvpx", "yuv420p", "webm", {"g": "12", "cpu-used": "8", "auto-alt-ref": "1"}),
    "av1": ("libsvtav1", "yuv420p", "mp4", {"g": "12", "preset": "12"}),
    "mpeg4 avi": ("mpeg4", "yuv420p", "avi", {"g": "12"}),
    "mpeg4 avi b": ("mpeg4", "yuv420p", "avi", {"g": "12", "bf": "2"}),
    "h264 avi": ("libx264", "yuv420p", "avi", {"g": "12", "bf": "3"}),
    "mpeg2 mkv": ("mpeg2video", "yuv420p", "matroska", {"g": "12", "bf": "2"}),
    "prores mov": ("prores_ks", "yuv422p10le", "mov", {}),
}


def _picture(index: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * a + y * b) / 9 + index * c) for a, b, c in ((1, 0, 0.3), (0, 1, 0.2))]
    picture = np.stack([127 + 90 * waves[0], 127 + 90 * waves[1], 4.0 * index + 0 * x], axis=-1)
    return picture.clip(0, 255).astype(np.uint8)


def write(
    codec: str,
    pixels: str,
    form: str,
    options: dict[str, str],
    *,
    count: int = 40,
    size: tuple[int, int] = (48, 64),
    **context: Any,
) -> bytes:
    """`count` waving pictures at 25 fps; `rotation` and other fields of the stream in `context`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.options = {"threads": "1", **options}
        if "rotation" in context:
            stream.set_display_rotation(context.pop("rotation"))
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(_picture(index, *size), format="rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def reference(data: bytes) -> np.ndarray:
    """All frames, decoded from the start without any skipping."""
    with av.open(io.BytesIO(data), "r") as container:
        flags = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        frames = container.decode(container.streams.video[0])
        return np.stack(
            [f.reformat(format="rgb24", interpolation=flags).to_ndarray() for f in frames]
        )


@pytest.mark.parametrize("few", [64, 2], ids=["timeline read whole", "around the window"])
@pytest.mark.parametrize("name", CODECS)
def test_any_window_is_bit_equal_to_a_decode_of_the_whole(
    name: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_FEW_FRAMES", few)
    codec, pixels, form, options = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    data = write(codec, pixels, form, options)
    whole = reference(data)
    info = probe(data)
    assert (info.frames, info.height, info.width) == (40, 48, 64)
    for start in range(0, 32, 3):
        for indices in (range(start, start + 8, 2), [start + 7], [start, 39]):
            clip = decode_clip(data, [(i + 0.3) / 25 for i in indices])
            assert np.array_equal(clip, whole[list(indices)]), (start, list(indices))
    assert np.array_equal(list(iter_frames(data, 0.4, 99.0)), whole[10:])
    with pytest.raises(DecodeError, match="clip lasts"):
        decode_clip(data, [1.2, 1.7])


def test_a_window_of_a_long_clip_reads_only_its_own_packets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several edits and lengths, whose windows equal those of a timeline that is read whole."""
    data = write("libx264", "yuv420p", "mp4", {"g": "20", "crf": "30"}, count=200)
    times = [2.0, 2.1, 2.5]
    expected = decode_clip(data, times)

    def fail(*args: object) -> None:
        raise AssertionError("the whole timeline was read")

    monkeypatch.setattr(with_pyav, "read_timeline", fail)
    assert np.array_equal(decode_clip(data, times), expected)
    assert len(decode_clip(data, [0.0])) == len(decode_clip(data, [7.96])) == 1


@pytest.mark.parametrize("name", ["h264", "h264 open groups", "hevc", "vp9", "vp8", "h264 avi"])
def test_decord_gives_the_same_frames(name: str) -> None:
    pytest.importorskip("decord")
    codec, pixels, form, options = CODECS[name]
    data = write(codec, pixels, form, options)
    times = [i / 25 for i in (3, 11, 12, 13, 30, 39)]
    one, two = (decode_clip(data, times, decoder=name) for name in ("pyav", "decord"))
    assert psnr(one, two) > 30


def test_decord_says_that_it_cannot_read_av1(real_clips: Path) -> None:
    pytest.importorskip("decord")
    data = write("libsvtav1", "yuv420p", "mp4", {"preset": "12"}, count=3)
    with pytest.raises(DecodeError, match="decord cannot read AV1"):
        decode_clip(data, [0.0], decoder="decord")


@pytest.mark.parametrize("path", ["bikes.mp4", "nasa_13013.mp4", "h265_video.mp4", "av1_video.mkv"])
def test_windows_of_real_clips_are_bit_equal(real_clips: Path, path: str) -> None:
    if not (real_clips / path).exists():
        pytest.skip("no real clips here")
    data = (real_clips / path).read_bytes()
    info = probe(data)
    with av.open(io.BytesIO(data), "r") as container:
        video = max(container.streams.video, key=lambda s: s.codec_context.width)
        flags = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        whole = [
            f.reformat(64, 36, format="rgb24", interpolation=flags).to_ndarray()
            for f in container.decode(video)
        ]
    assert len(whole) == info.frames
    for start in np.linspace(0, max(info.frames - 12, 0), 5).astype(int):
        indices = range(start, min(start + 12, info.frames), 2)
        times = [(i + 0.3) / info.fps for i in indices]
        assert np.array_equal(decode_clip(data, times, size=(36, 64)), [whole[i] for i in indices])


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotated_video_is_shown_upright(decoder: str, rotation: int) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    data = write("libx264", "yuv420p", "mp4", {"crf": "5"}, count=4, rotation=rotation)
    upright = np.rot90(reference(data), rotation // 90, axes=(1, 2))
    clip = decode_clip(data, [0.0, 0.1], decoder=decoder)
    assert psnr(clip, upright[[0, 2]]) > 35
    info = probe(data)
    assert (info.height, info.width) == clip.shape[1:3] == upright.shape[1:3]
    small = decode_clip(data, [0.0], decoder=decoder, size=(20, 28))
    assert small.shape == (1, 20, 28, 3)
    assert psnr(small[0], np.asarray(Image.fromarray(upright[0]).resize((28, 20)))) > 25


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_turn_by_their_exif_tag(orientation: int, form: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x112] = orientation
    buffer = io.BytesIO()
    options = {"quality": 95} | ({"lossless": True} if form == "WEBP" else {})
    Image.fromarray(_picture(3, 40, 64)).save(buffer, form, exif=exif, **options)
    data = buffer.getvalue()
    upright = np.asarray(ImageOps.exif_transpose(Image.open(buffer)).convert("RGB"))
    for decoder in ("pyav", "decord"):
        if decoder == "pyav" or pytest.importorskip("decord"):
            clip = decode_clip(data, [0.0], decoder=decoder)
            assert clip.shape[1:] == upright.shape and psnr(clip[0], upright) > 33
    assert (probe(data).height, probe(data).width) == upright.shape[:2]


def test_oblong_pixels_widen_the_frame() -> None:
    for form in ("mp4", "matroska", "avi"):
        aspect = Fraction(4, 3)
        data = write("libx264", "yuv420p", form, {}, count=3, sample_aspect_ratio=aspect)
        info = probe(data)
        assert (info.height, info.width) == (48, 85), form
        assert decode_clip(data, [0.0]).shape == (1, 48, 85, 3)


@pytest.mark.parametrize("size", [(48, 63), (47, 64), (17, 33)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    data = write("libx264", "yuv444p", "mp4", {"crf": "5"}, count=5, size=size)
    assert decode_clip(data, [0.1]).shape == (1, *size, 3)
    assert psnr(decode_clip(data, [0.1])[0], _picture(2, *size)) > 35


def test_the_best_stream_is_chosen_and_cover_art_is_none() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, (height, width) in zip(streams, ((32, 32), (64, 96)), strict=True):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        streams[0].disposition = Disposition(0)
        streams[1].disposition = Disposition.default
        cover = container.add_stream("mjpeg", rate=25)
        cover.height, cover.width, cover.pix_fmt = 480, 640, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        for stream in (*streams, cover):
            for index in range(1 if stream is cover else 6):
                picture = _picture(index, stream.height, stream.width)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode())
    info = probe(buffer.getvalue())
    assert (info.frames, info.height, info.width, info.codec) == (6, 64, 96, "h264")


def test_frames_that_an_edit_list_leaves_out_are_never_shown() -> None:
    """The edit begins in the middle of a group: its keyframe is decoded and not shown."""
    data = bytearray(write("libx264", "yuv420p", "mp4", {"g": "12", "bf": "2"}))
    whole = decode_clip(bytes(data), [i / 25 for i in range(40)])
    with av.open(io.BytesIO(bytes(data)), "r") as container:
        ticks = int(Fraction(1, 5) / (container.streams.video[0].time_base or 1))  # 5 frames
    at = data.index(b"elst") + 12
    duration, start = struct.unpack(">Ii", data[at : at + 8])
    data[at : at + 8] = struct.pack(">Ii", duration - 200, start + ticks)
    assert probe(bytes(data)).frames == 35
    for start in range(0, 30, 4):
        clip = decode_clip(bytes(data), [(start + i + 0.3) / 25 for i in range(5)])
        assert np.array_equal(clip, whole[start + 5 : start + 10])


def test_iter_frames_repeats_and_drops_to_a_rate() -> None:
    data = write("libx264", "yuv420p", "mp4", {"g": "12"})
    whole = reference(data)
    half = list(iter_frames(data, 0.0, 1.6, fps=12.5))
    assert np.array_equal(half, whole[0::2])
    twice = list(iter_frames(data, 0.2, 0.6, fps=50, size=(48, 64)))
    assert np.array_equal(twice, np.repeat(whole[5:15], 2, axis=0))
    assert [f.shape for f in iter_frames(data, 1.0, 1.1, size=(20, 30))] == [(20, 30, 3)] * 3
    for start, stop in ((1.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="nothing to decode"):
            next(iter_frames(data, start, stop))
    with pytest.raises(DecodeError, match="no frame begins"):
        next(iter_frames(data, 5.0, 6.0))


def test_an_early_edit_with_media_in_several_boxes_is_whole_as_long_as_all_of_it_is_there() -> None:
    data = bytearray(write("libx264", "yuv420p", "mp4", {"g": "6", "bf": "2"}))
    at = data.index(b"elst") + 12
    data[at : at + 4] = struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] // 2)
    two = bytes(data) + struct.pack(">I", 1008) + b"mdat" + bytes(1000)
    assert 20 <= probe(two).frames < 40
    table = data.index(b"stco") + 12
    data[table : table + 4] = struct.pack(">I", len(two) + 5000)  # in a box that is cut off
    with pytest.raises(DecodeError):
        probe(bytes(data) + two[len(data) :])
