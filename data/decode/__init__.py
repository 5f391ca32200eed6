"""Video bytes to frames and back: the one door to PyAV and decord.

Frames are chosen by presentation time, so variable frame rates, non-zero starts and edit lists need
no care from callers, and they come as a player shows them: turned by display matrix or EXIF tag,
with square pixels. Container formats are named by magic bytes, never guessed by FFmpeg: a member
that is really a playlist could otherwise make it open other files or URLs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longtake.data.decode.containers import DecodeError
from longtake.data.decode.encode import encode_image, encode_video
from longtake.data.decode.pixels import RESIZES
from longtake.data.decode.source import (
    HeaderLimits,
    frame_rate,
    frame_times,
    is_image,
    open_video,
    read_timeline,
)
from longtake.data.decode.with_decord import decode_decord
from longtake.data.decode.with_pyav import (
    decode_pyav,
    first_look,
    header_look,
    iter_frames,
    pixel_format,
)

__all__ = [
    "DECODERS",
    "IMAGE_EXTENSIONS",
    "RESIZES",
    "VIDEO_EXTENSIONS",
    "DecodeError",
    "HeaderLimits",
    "VideoInfo",
    "decode_clip",
    "encode_image",
    "encode_video",
    "frame_times",
    "iter_frames",
    "pixel_format",
    "probe",
]

DECODERS = ("auto", "pyav", "decord")
VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "mov", "avi")
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


@dataclass(frozen=True)
class VideoInfo:
    """What packets and header say. Times in seconds; an image has fps 0.

    `height` and `width` are those on display: turned as the file asks, with square pixels.
    """

    frames: int
    fps: float
    width: int
    height: int
    duration: float
    codec: str
    keyframe_interval: float
    start_time: float


def probe(data: bytes, *, limits: HeaderLimits | None = None) -> VideoInfo:
    """Size, rate, length and codec of a video or image, from header and packets. No frame of an
    MP4 is decoded; other containers leave the size on display to the codec, so one frame is.

    Raises:
        DecodeError: unknown container, no video stream, over the limits, truncated or damaged file.
    """
    limits = limits or HeaderLimits()
    with open_video(data, limits) as (container, stream):
        timeline = read_timeline(data, container, stream, limits)
        look = header_look(data, container, stream, limits)
        if look is None:
            look = first_look(data, container, stream, timeline, limits)
        height, width = look.size
        duration = 0.0 if is_image(container) else timeline.duration
        return VideoInfo(
            frames=len(timeline.pts),
            fps=0.0 if is_image(container) else frame_rate(stream, timeline),
            width=width,
            height=height,
            duration=duration,
            codec=stream.codec_context.codec.canonical_name,
            keyframe_interval=duration / max(len(timeline.keyframes), 1),
            start_time=float(timeline.pts[0] * timeline.time_base),
        )


def decode_clip(
    data: bytes,
    times: Sequence[float],
    *,
    decoder: str = "auto",
    size: tuple[int, int] | None = None,
    limits: HeaderLimits | None = None,
    resize: str = "fast",
    frame_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Frames on display at `times` (seconds from the first frame), RGB uint8 (T, H, W, 3).

    `size` = (height, width) resizes while converting: `fast` with a triangle filter, `antialias`
    faithfully (see PictureMaker). `decoder`: `auto` is PyAV, since it reads every codec tried and
    random windows 1.1 to 1.5 times as fast as decord, the more B-frames the faster
    (tests/bench/bench_decode.py); `decord` cannot read AV1, and still pictures are read by PyAV
    under its name. `frame_size` (height, width) is the size on display that the caller counts on:
    a clip of another one would come out of shape, and is an error.

    Raises:
        DecodeError: nothing but the whole clip is ever returned.
        ValueError: unknown or absent decoder, unknown resize, no times.
    """
    for key, value, choices in (("decoder", decoder, DECODERS), ("resize", resize, RESIZES)):
        if value not in choices:
            raise ValueError(f"data.{key}={value!r} must be one of {', '.join(choices)}")
    if not len(times):
        raise ValueError("times is empty; ask for at least one frame")
    decode = decode_decord if decoder == "decord" else decode_pyav
    return decode(data, times, size, limits or HeaderLimits(), resize, frame_size)
