"""One file into the clips that a shard stores: smaller, cut to length, with frequent keyframes."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from longtake.data.decode import (
    DecodeError,
    VideoInfo,
    decode_clip,
    encode_image,
    iter_frames,
    probe,
)
from longtake.data.decode.mux import ClipEncoder, FFmpegError, Sound, without_sound
from longtake.data.decode.source import frame_times
from longtake.data.samples import SampleError

PIXEL_FORMATS = ("yuv420p", "yuv444p")
_MIN_SIDE = 16  # H.264's macroblock


@dataclass(frozen=True)
class Recipe:
    """What happens to every file; by default its bytes stay as they are.

    `size` (height, width) in pixels re-encodes: frames shrink, keeping their aspect ratio, to the
    smallest that still cover it (never enlarged), rotation is baked in, presentation times are
    kept. `crf` 16 is a little below x264's mark of visually lossless, as small frames are looked at
    enlarged: 35-45 dB at 256 pixels, where yuv420p at qp 0 ends at 41-52. Durations in seconds.
    """

    size: tuple[int, int] | None = None
    gop: int = 30
    crf: int = 16
    pixel_format: str = "yuv420p"
    max_duration: float = math.inf
    min_duration: float = 0.0
    keep_audio: bool = True

    def __post_init__(self) -> None:
        """ValueError for values out of range."""
        if self.size and min(self.size) < _MIN_SIDE:
            raise ValueError(f"recode={self.size}: sides must be at least {_MIN_SIDE} pixels")
        if self.gop < 1 or not 0 <= self.crf <= 51:
            raise ValueError(f"gop={self.gop} must be >= 1, crf={self.crf} lie in 0..51")
        if self.pixel_format not in PIXEL_FORMATS:
            raise ValueError(f"pixel_format={self.pixel_format!r}: one of {PIXEL_FORMATS}")
        if not (self.max_duration > 0 and 0 <= self.min_duration <= self.max_duration):
            raise ValueError(
                f"max_duration={self.max_duration} must be positive and min_duration="
                f"{self.min_duration} lie in 0..max_duration"
            )
        if self.size is None and self.max_duration < math.inf:
            raise ValueError(
                f"max_duration={self.max_duration} needs recode: bytes can be copied from keyframe "
                "to keyframe only, so parts would not be what was asked for; 8192 keeps the size"
            )


@dataclass(frozen=True)
class Clip:
    """A payload to store. `start` and `stop` are seconds in the file that it was taken from."""

    ext: str
    data: bytes
    fps: float
    start: float
    stop: float


@dataclass(frozen=True)
class _Part:
    """Frames [first, end) of a video, on display from `start` to `stop` seconds."""

    first: int
    end: int
    start: float
    stop: float


def make_clips(
    data: bytes, ext: str, recipe: Recipe, alive: Callable[[], None]
) -> Iterator[Clip | None]:
    """The clips of one file in order; None stands for one shorter than min_duration.

    `alive` is called for every frame, so that a watcher can tell slow from stuck.

    Raises:
        DecodeError: the file is damaged.
        SampleError: the recipe cannot be followed.
    """
    info = probe(data)
    is_image = info.fps == 0
    try:
        if not is_image and info.duration < recipe.min_duration:
            yield None
        elif recipe.size is None or is_image:
            yield _whole(data, ext, info, recipe)
        else:
            yield from _recode(data, info, recipe, alive)
    except FFmpegError as error:
        raise DecodeError(f"cannot be recoded: {error.strerror}") from error


def _whole(data: bytes, ext: str, info: VideoInfo, recipe: Recipe) -> Clip:
    """The file as one clip; an image is resized to PNG, which loses nothing more."""
    size = _target(info, recipe.size, step=1) if recipe.size else (info.height, info.width)
    is_smaller = size != (info.height, info.width)
    # One frame is always decoded: a header can promise more than the decoder keeps.
    frame = decode_clip(data, [0.0], size=size if is_smaller else None, resize="antialias")[0]
    if is_smaller:
        ext, data = "png", encode_image(frame)
    elif info.fps and not recipe.keep_audio:
        data = _mute(data, ext, info)
    return Clip(ext, data, info.fps, 0.0, info.duration)


def _target(info: VideoInfo, cover: tuple[int, int], step: int) -> tuple[int, int]:
    """(height, width) of a frame shrunk until it just covers `cover`, in multiples of `step`."""
    least = [-(-side // step) * step for side in cover]
    scale = min(1.0, max(least[0] / info.height, least[1] / info.width))
    height, width = (
        min(round(side * scale / step), side // step) * step for side in (info.height, info.width)
    )
    if min(height, width) < _MIN_SIDE:
        raise SampleError(f"{info.width}x{info.height}: sides below {_MIN_SIDE} pixels")
    return height, width


def _recode(
    data: bytes, info: VideoInfo, recipe: Recipe, alive: Callable[[], None]
) -> Iterator[Clip | None]:
    assert recipe.size is not None
    size = _target(info, recipe.size, step=2 if recipe.pixel_format == "yuv420p" else 1)
    times = frame_times(data)  # (N,)
    frames = iter_frames(data, 0.0, info.duration + 1.0, size=size, resize="antialias")
    sound = Sound(data, info.start_time) if recipe.keep_audio else None
    for part in _parts(times, info.duration, recipe.max_duration):
        taken = itertools.islice(frames, part.end - part.first)
        if part.stop - part.start < recipe.min_duration:
            for _ in taken:
                alive()
            yield None
            continue
        encoder = ClipEncoder(
            *(size, info.fps),
            crf=recipe.crf,
            gop=recipe.gop,
            pixel_format=recipe.pixel_format,
            sound=sound,
        )
        ends = [*times[part.first + 1 : part.end], part.stop]
        for time, end in zip(times[part.first : part.end], ends, strict=True):
            alive()
            encoder.add(next(taken, None), time - part.start, end - time)
        encoded = encoder.finish(part.start, part.stop)
        made = probe(encoded)
        if made.frames != part.end - part.first:
            raise DecodeError(f"{made.frames} of {part.end - part.first} frames were encoded")
        yield Clip("mp4", encoded, made.fps, part.start, part.stop)
    if next(frames, None) is not None:
        raise DecodeError(f"more than the {len(times)} frames that its packets announce")


def _parts(times: np.ndarray, end: float, longest: float) -> list[_Part]:
    """Cuts every `longest` seconds, at the first frame that is due then (within 1 µs)."""
    number = np.floor((times + 1e-6) / longest)
    firsts = np.flatnonzero(np.diff(number, prepend=-1.0)).tolist()
    starts = [float(times[first]) for first in firsts]
    bounds = zip(firsts, [*firsts[1:], len(times)], starts, [*starts[1:], end], strict=True)
    return [_Part(*bound) for bound in bounds]


def _mute(data: bytes, ext: str, info: VideoInfo) -> bytes:
    mute = without_sound(data, ext)
    made = probe(mute)
    facts = [(i.frames, i.width, i.height, round(i.duration, 1)) for i in (made, info)]
    if facts[0] != facts[1]:
        raise SampleError("its sound cannot be taken out without changing its frames; use --recode")
    return mute
