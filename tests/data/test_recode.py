"""Recoded clips show the source's frames at the source's times, with its sound if asked for."""

import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from longtake.data.decode import (
    DecodeError,
    decode_clip,
    encode_image,
    encode_video,
    iter_frames,
    probe,
)
from longtake.data.decode.source import frame_times
from longtake.data.pack.recode import Clip, Recipe, make_clips
from longtake.data.samples import SampleError


def scene(index: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A frame (H, W, 3) that tells its index: a soft bar that moves over a ramp."""
    x = np.arange(width)
    bar = 120 * np.exp(-(((x - 7 * index) % width - width / 2) ** 2) / 60)
    ramp = np.linspace(30, 110, height)[:, None]
    return np.repeat((ramp + bar)[..., None], 3, axis=2).astype(np.uint8)


def movie(
    times_ms: list[int],
    *,
    rotation: int = 0,
    sound: str | None = None,
    name: str = "mp4",
    shape: tuple[int, int] = (64, 96),
) -> bytes:
    """`scene` frames at the given times; the sound is 500 Hz, one octave higher each second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=name) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = shape
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "5", "g": "250"}
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        audio: Any = container.add_stream(sound, rate=16000, layout="mono") if sound else None
        for index, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(scene(index, *shape), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            t = np.arange(16 * times_ms[-1]) / 16000
            wave = 0.3 * np.sin(2 * np.pi * 500 * 2 ** np.floor(t) * t)
            block = av.AudioFrame.from_ndarray(
                (wave * 32767).astype(np.int16)[None], format="s16", layout="mono"
            )
            block.rate, block.pts = 16000, 0
            container.mux(audio.encode(block))
            container.mux(audio.encode())
    return buffer.getvalue()


def clips(data: bytes, recipe: Recipe, ext: str = "mp4") -> list[Clip | None]:
    return list(make_clips(data, ext, recipe, lambda: None))


def only(data: bytes, recipe: Recipe, ext: str = "mp4") -> Clip:
    [clip] = clips(data, recipe, ext)
    assert clip is not None
    return clip


def frames_of(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    return np.stack(list(iter_frames(data, 0.0, math.inf, size=size, resize="antialias")))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def octave(data: bytes) -> list[int]:
    """Which second of the source is heard in each half second of a clip."""
    with av.open(io.BytesIO(data), "r") as container:
        [stream] = container.streams.audio
        frames = list(container.decode(stream))
    wave = np.concatenate([f.to_ndarray().mean(axis=0) for f in frames]).astype(np.float64)
    rate = frames[0].sample_rate
    heard = []
    for start in range(rate // 10, len(wave) - rate // 4, rate // 2):
        spectrum = np.abs(np.fft.rfft(wave[start : start + rate // 4]))
        heard.append(round(np.log2(spectrum.argmax() * 4 / 500)))
    return heard


@pytest.mark.parametrize(
    ("shape", "cover", "pixel_format", "made"),
    [
        ((64, 96), (32, 32), "yuv420p", (32, 48)),
        ((64, 96), (32, 64), "yuv420p", (42, 64)),
        ((96, 54), (20, 20), "yuv420p", (36, 20)),
        ((47, 65), (8192, 8192), "yuv420p", (46, 64)),
        ((47, 65), (8192, 8192), "yuv444p", (47, 65)),
        ((47, 65), (31, 31), "yuv420p", (32, 44)),
        ((47, 65), (31, 31), "yuv444p", (31, 43)),
    ],
)
def test_sizes_cover_keep_their_aspect_and_never_grow(
    shape: tuple[int, int], cover: tuple[int, int], pixel_format: str, made: tuple[int, int]
) -> None:
    clip = only(movie([0, 40, 80], shape=shape), Recipe(cover, pixel_format=pixel_format))
    info = probe(clip.data)
    assert (info.height, info.width) == made and clip.ext == "mp4"
    with av.open(io.BytesIO(clip.data), "r") as container:
        assert container.streams.video[0].codec_context.pix_fmt == pixel_format


def test_variable_frame_rates_keep_their_times() -> None:
    times = [0, 40, 80, 81, 200, 500, 533, 567, 600, 1500]
    source = movie(times)
    clip = only(source, Recipe((48, 48), crf=5))
    np.testing.assert_allclose(frame_times(clip.data), np.array(times) / 1000, atol=1e-5)
    wanted = frames_of(source, size=(48, 72))
    assert min(psnr(a, b) for a, b in zip(frames_of(clip.data), wanted, strict=True)) > 33


def test_ntsc_rates_are_exact() -> None:
    frames = np.stack([scene(i) for i in range(31)])
    source = encode_video(frames, 24000 / 1001)
    clip = only(source, Recipe((48, 48)))
    assert clip.fps == pytest.approx(24000 / 1001, abs=1e-9)
    np.testing.assert_allclose(frame_times(clip.data), np.arange(31) * 1001 / 24000, atol=1e-9)


def test_every_frame_of_a_split_is_in_one_part() -> None:
    source = movie([40 * i for i in range(57)])  # 2.28 s
    parts = clips(source, Recipe((64, 64), crf=5, max_duration=0.75))
    kept = [part for part in parts if part is not None]
    assert [(p.start, p.stop) for p in kept] == [
        pytest.approx(bounds) for bounds in [(0, 0.76), (0.76, 1.52), (1.52, 2.28)]
    ]
    assert [probe(part.data).frames for part in kept] == [19, 19, 19]
    for part in kept:
        np.testing.assert_allclose(frame_times(part.data), np.arange(19) * 0.04, atol=1e-5)
    shown = np.concatenate([frames_of(part.data) for part in kept])
    wanted = frames_of(source)
    for index, frame in enumerate(shown):
        scores = [psnr(frame, candidate) for candidate in wanted]
        assert np.argmax(scores) == index and scores[index] > 33


def test_short_tails_and_short_videos_are_dropped() -> None:
    source = movie([40 * i for i in range(53)])
    parts = clips(source, Recipe((64, 64), max_duration=1.0, min_duration=0.2))
    assert [part and probe(part.data).frames for part in parts] == [25, 25, None]
    assert clips(source, Recipe(min_duration=3.0)) == [None]
    still = encode_image(scene(0))
    assert clips(still, Recipe(min_duration=3.0), "png") != [None]


def test_keyframes_come_often_and_bytes_repeat() -> None:
    source = movie([40 * i for i in range(60)])
    first, again = (only(source, Recipe((64, 64), gop=8)).data for _ in range(2))
    assert first == again
    assert probe(first).keyframe_interval <= 8 * 0.04 + 1e-6


def test_rotation_is_baked_in() -> None:
    source = movie([0, 40, 80], rotation=90)
    clip = only(source, Recipe((48, 48), crf=5))
    info = probe(clip.data)
    assert (info.height, info.width) == (72, 48)
    with av.open(io.BytesIO(clip.data), "r") as container:
        assert next(container.decode(video=0)).rotation == 0
    assert psnr(frames_of(clip.data)[1], frames_of(source, size=(72, 48))[1]) > 33


def test_real_clips_lose_little(real_clips: Path) -> None:
    for name in ("carphone_pristine.mp4", "h265_video.mp4", "0.mp4"):
        if not (real_clips / name).exists():
            continue
        source = (real_clips / name).read_bytes()
        info = probe(source)
        clip = only(source, Recipe((64, 64), pixel_format="yuv444p"))
        np.testing.assert_allclose(frame_times(clip.data), frame_times(source), atol=1e-5)
        made = probe(clip.data)
        wanted = frames_of(source, size=(made.height, made.width))
        assert made.frames == info.frames and psnr(frames_of(clip.data), wanted) > 36


@pytest.mark.parametrize(("sound", "name"), [("aac", "mp4"), ("flac", "matroska")])
def test_sound_goes_with_its_part(sound: str, name: str) -> None:
    source = movie([40 * i for i in range(75)], sound=sound, name=name)
    assert octave(source) == [0, 0, 1, 1, 2, 2]
    parts = clips(source, Recipe((64, 64), max_duration=1.0))
    assert [octave(part.data) for part in parts if part] == [[0, 0], [1, 1], [2, 2]]
    whole = only(source, Recipe((64, 64)))
    assert octave(whole.data) == octave(source)
    assert probe(whole.data).duration == pytest.approx(probe(source).duration, abs=0.05)


@pytest.mark.parametrize("recipe", [Recipe(keep_audio=False), Recipe((64, 64), keep_audio=False)])
@pytest.mark.parametrize(("name", "ext"), [("mp4", "mp4"), ("matroska", "mkv"), ("mov", "mov")])
def test_sound_is_dropped(recipe: Recipe, name: str, ext: str) -> None:
    source = movie([40 * i for i in range(25)], sound="aac", name=name)
    clip = only(source, recipe, ext)
    with av.open(io.BytesIO(clip.data), "r") as container:
        assert [stream.type for stream in container.streams] == ["video"]
    if recipe.size is None:
        assert clip.ext == ext and np.array_equal(frames_of(clip.data), frames_of(source))
        np.testing.assert_allclose(frame_times(clip.data), frame_times(source), atol=2e-3)


def test_bytes_without_sound_stay_as_they_are() -> None:
    source = movie([0, 40, 80])
    assert only(source, Recipe(keep_audio=False)).data is source
    assert only(source, Recipe()).data is source


def test_images_shrink_to_png_or_stay() -> None:
    still = encode_image(scene(0, 64, 96))
    clip = only(still, Recipe((31, 31)), "jpg")
    assert (clip.ext, probe(clip.data).height, probe(clip.data).width) == ("png", 31, 46)
    wanted = decode_clip(still, [0.0], size=(31, 46), resize="antialias")
    assert np.array_equal(decode_clip(clip.data, [0.0]), wanted)
    assert only(still, Recipe((64, 64)), "png").data is still


def test_damage_and_tiny_frames_are_reasons() -> None:
    with pytest.raises(SampleError, match="64x14: sides below 16 pixels"):
        only(movie([0, 40], shape=(14, 64)), Recipe((64, 64)))
    broken = bytearray(movie([40 * i for i in range(60)]))
    middle = broken.find(b"mdat") + 2000
    broken[middle : middle + 400] = bytes(400)
    with pytest.raises(DecodeError):
        clips(bytes(broken), Recipe((64, 64)))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"max_duration": 3.0}, "needs recode"),
        ({"size": (64, 64), "max_duration": 1.0, "min_duration": 2.0}, "min_duration"),
        ({"size": (8, 64)}, "at least 16"),
        ({"size": (64, 64), "crf": 60}, "crf=60"),
        ({"size": (64, 64), "pixel_format": "rgb24"}, "pixel_format"),
    ],
)
def test_recipes_are_checked(recipe: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**recipe)
