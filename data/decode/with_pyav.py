"""Frames by presentation time through PyAV: few packets decoded, every pixel exact.

A frame that is neither wanted nor referred to is never decoded, groups of pictures without a wanted
frame are jumped over, and the decoder is drained as soon as the last wanted packet is in. None of
that changes a pixel of the frames that come out.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from longtake.data.decode.containers import (
    DecodeError,
    container_format,
    exif_orientation,
    track_matrix,
)
from longtake.data.decode.pixels import PictureMaker, Turn, display_turn, exif_turn, matrix_turn
from longtake.data.decode.source import (
    HeaderLimits,
    Timeline,
    is_image,
    is_worth_a_window,
    open_video,
    read_timeline,
    read_window,
)

_IDR = re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65]")  # IDR slice (ITU-T H.264, 7.3.1)
# Decoders that may be told for each packet to leave out what nothing refers to; others look at it
# once (AV1) or never.
_CAN_SKIP = ("h264", "mpeg1video", "mpeg2video", "mpeg4", "vp8")
_MAX_PENDING = 32  # frames that may come out before one that is shown earlier


@dataclass(frozen=True)
class FirstLook:
    """Size (height, width) as displayed, and how frames turn for it."""

    size: tuple[int, int]
    turn: Turn


class _Found(NamedTuple):
    """A decoded frame, its time stamp, and width over height of its pixels."""

    time: int
    frame: VideoFrame
    aspect: float


def decode_pyav(
    data: bytes,
    times: Sequence[float],
    size: tuple[int, int] | None,
    limits: HeaderLimits,
    resize: str,
    frame_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """`decode_clip` of PyAV: RGB uint8 (T, H, W, 3), in memory as (T, 3, H, W)."""

    def clip(container: InputContainer, stream: VideoStream, timeline: Timeline) -> np.ndarray:
        maker = PictureMaker(size, resize, limits, _known_turn(data, container), frame_size)
        return _clip(data, container, stream, timeline, times, maker)

    with open_video(data, limits) as (container, stream):
        if not is_worth_a_window(container, stream):
            return clip(container, stream, read_timeline(data, container, stream, limits))
        window = read_window(container, stream, times)
        if window is not None:
            with suppress(_Missing):  # an open group of pictures, say, that needs what lies before
                return clip(container, stream, window)
    with open_video(data, limits) as (container, stream):
        return clip(container, stream, read_timeline(data, container, stream, limits))


def _clip(
    data: bytes,
    container: InputContainer,
    stream: VideoStream,
    timeline: Timeline,
    times: Sequence[float],
    maker: PictureMaker,
) -> np.ndarray:
    places: dict[int, list[int]] = {}
    for place, time in enumerate(timeline.pts[timeline.indices(times)].tolist()):
        places.setdefault(time, []).append(place)
    clip = None
    wanted = sorted(places)
    for found in _wanted_frames(data, container, stream, timeline, maker.limits, wanted):
        picture = maker(found.frame, found.aspect)
        if clip is None:
            clip = np.empty((len(times), *picture.shape), np.uint8)  # (T, 3, H, W)
        for place in places.pop(found.time):
            clip[place] = picture
    if places or clip is None:
        raise _missing(timeline, min(places))
    return clip.transpose(0, 2, 3, 1)


def iter_frames(
    data: bytes,
    start: float,
    stop: float,
    *,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    resize: str = "fast",
    limits: HeaderLimits | None = None,
) -> Iterator[np.ndarray]:
    """Pictures RGB uint8 (H, W, 3) on display in [start, stop) seconds, one at a time.

    With `fps` the one at start + i / fps for every i, so that frames of a variable rate repeat or
    drop; without, each frame that begins in the interval once. A `stop` behind the end means the
    end.

    Raises:
        DecodeError: at the first picture that cannot be decoded; never ends early.
        ValueError: nothing can lie in the interval.
    """
    if not 0 <= start < stop or (fps is not None and not fps > 0):
        raise ValueError(f"frames from {start} to {stop} s at fps={fps}: nothing to decode")
    limits = limits or HeaderLimits()
    with open_video(data, limits) as (container, stream):
        timeline = read_timeline(data, container, stream, limits)
        shown = timeline.pts[_interval(timeline, start, stop, fps)]
        wanted = np.unique(shown).tolist()
        maker = PictureMaker(size, resize, limits, _known_turn(data, container))
        frames = _wanted_frames(data, container, stream, timeline, limits, wanted)
        pending: dict[int, np.ndarray] = {}
        for time, repeats in zip(*np.unique(shown, return_counts=True), strict=True):
            while time not in pending:
                found = next(frames, None)
                if found is None or len(pending) > _MAX_PENDING:
                    raise _missing(timeline, int(time))
                pending[found.time] = maker(found.frame, found.aspect)
            picture = np.ascontiguousarray(pending.pop(int(time)).transpose(1, 2, 0))
            for _ in range(repeats):
                yield picture


def pixel_format(data: bytes) -> str:
    """How the first frame is stored, as FFmpeg names it: yuv420p, yuv444p, rgb24, ...

    Raises:
        DecodeError: it cannot be decoded.
    """
    limits = HeaderLimits()
    with open_video(data, limits) as (container, stream):
        timeline = read_timeline(data, container, stream, limits)
        first = [int(timeline.pts[0])]
        for found in _wanted_frames(data, container, stream, timeline, limits, first):
            return found.frame.format.name
        raise _missing(timeline, first[0])


def _interval(timeline: Timeline, start: float, stop: float, fps: float | None) -> np.ndarray:
    """Indices of the frames of `iter_frames`, in order."""
    if fps is None:
        begins = timeline.seconds
        found = np.flatnonzero((begins >= start - 1e-9) & (begins < stop - 1e-9))
        if not len(found):
            raise DecodeError(f"no frame begins between {start:.3f} and {stop:.3f} s")
        return found
    stop = min(stop, timeline.duration)
    count = max(int(np.ceil((stop - start) * fps - 1e-6)), 1)
    return timeline.indices(start + np.arange(count) / fps)


def header_look(
    data: bytes, container: InputContainer, stream: VideoStream, limits: HeaderLimits
) -> FirstLook | None:
    """What the header of an MP4 says; None where it, or another container, leaves the shape of
    pixels or the way up to the codec.

    Raises:
        DecodeError: over the limits.
    """
    context = stream.codec_context
    if container_format(data) != "mov" or not (context.width and context.height):
        return None
    matrix = track_matrix(data, stream.id)
    if matrix is None:
        return None
    turn = matrix_turn(*matrix)
    width = round(context.width * _pixel_aspect(container, stream))
    limits.check_size(width, context.height)
    return FirstLook(turn.size(context.height, width), turn)


def first_look(
    data: bytes,
    container: InputContainer,
    stream: VideoStream,
    timeline: Timeline,
    limits: HeaderLimits,
) -> FirstLook:
    """What only decoding tells, from the first frame.

    Raises:
        DecodeError: it cannot be decoded, or is over the limits.
    """
    first = [int(timeline.pts[0])]
    for found in _wanted_frames(data, container, stream, timeline, limits, first):
        turn = _known_turn(data, container) or display_turn(found.frame)
        maker = PictureMaker(None, "fast", limits, turn)
        return FirstLook(maker.shown_size(found.frame, found.aspect), turn)
    raise _missing(timeline, first[0])


def _known_turn(data: bytes, container: InputContainer) -> Turn | None:
    """Pictures turn by their EXIF tag; videos by a matrix that comes with each frame: None."""
    return exif_turn(exif_orientation(data)) if is_image(container) else None


def _pixel_aspect(container: InputContainer, stream: VideoStream) -> float:
    """The container's word, or else the codec's, or 1. Densities of still pictures are for
    printing."""
    if is_image(container):
        return 1.0
    return float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)


class _Missing(DecodeError):
    """A frame that is in the timeline and does not come out of the decoder."""


def _missing(timeline: Timeline, time: int) -> _Missing:
    seconds = float((time - timeline.pts[0]) * timeline.time_base)
    return _Missing(f"frame at {seconds:.3f} s cannot be decoded")


def _wanted_frames(
    data: bytes,
    container: InputContainer,
    stream: VideoStream,
    timeline: Timeline,
    limits: HeaderLimits,
    wanted: list[int],
) -> Iterator[_Found]:
    """Those of the sorted time stamps `wanted` that can be decoded, by and large in order."""
    groups = np.searchsorted(timeline.keyframes, wanted, side="right") - 1
    # A whole group of pictures between two wanted ones is jumped over.
    cuts = np.flatnonzero(np.diff(groups) > 1) + 1
    for run, group in zip(np.split(np.asarray(wanted), cuts), groups[[0, *cuts]], strict=True):
        left = set(run.tolist())
        # Behind an open group of pictures the first ones cannot be decoded: then start earlier.
        for start in timeline.keyframes[max(group - 1, 0) : group + 1][::-1].tolist():
            for found in _from_keyframe(container, stream, timeline, start, left):
                left.discard(found.time)
                yield found
            if len(left) < len(run):
                break
        if len(left) == len(run) and timeline.is_whole:
            with open_video(data, limits) as (fresh, again):
                for found in _matched(fresh, again, timeline.pts if _is_avi(fresh) else None, left):
                    left.discard(found.time)
                    yield found


def _from_keyframe(
    container: InputContainer, stream: VideoStream, timeline: Timeline, start: int, left: set[int]
) -> Iterator[_Found]:
    """Frames from the keyframe at `start` on; none where they cannot begin with the first one."""
    container.seek(start, stream=stream)
    order = None
    if _is_avi(container):
        if not _is_clean_start(container, stream, start):
            return
        container.seek(start, stream=stream)
        order = timeline.pts[np.searchsorted(timeline.pts, start) :]
    first = min(left)
    for found in _matched(container, stream, order, set(left)):
        if first is not None and (found.time != first or found.frame.is_corrupt):
            return
        first = None
        yield found


def _matched(
    container: InputContainer, stream: VideoStream, order: np.ndarray | None, left: set[int]
) -> Iterator[_Found]:
    """Decodes from where the container stands until all of `left` came out.

    AVI stores no presentation times, and FFmpeg numbers its frames as they are decoded, which is
    wrong for B-frames: there the k-th frame that comes out has the k-th time of `order`.
    """
    left = set(left)
    number = 0
    for frame in _decoded(container, stream, left if order is None else None):
        time = frame.pts if frame.pts is not None else frame.dts or 0
        if order is not None:
            if number >= len(order):
                return
            time = int(order[number])
            number += 1
        if time in left:
            left.discard(time)
            yield _Found(time, frame, _pixel_aspect(container, stream))
            if not left:
                return


def _decoded(
    container: InputContainer, stream: VideoStream, wanted: set[int] | None
) -> Iterator[VideoFrame]:
    """Every frame, or those of time stamp `wanted` and the ones that they refer to."""
    context = stream.codec_context
    unseen = set(wanted or ())
    can_skip = wanted is not None and context.name in _CAN_SKIP
    for packet in container.demux(stream):
        if not packet.size:  # a dropped frame of AVI, or the end
            continue
        if wanted is not None:
            time = packet.pts if packet.pts is not None else packet.dts or 0
            if time not in unseen and packet.is_disposable:
                continue
            if can_skip:
                context.skip_frame = "DEFAULT" if time in unseen else "NONREF"
            unseen.discard(time)
        yield from context.decode(packet)
        if wanted is not None and not unseen:
            break
    yield from context.decode(None)


def _is_clean_start(container: InputContainer, stream: VideoStream, start: int) -> bool:
    """Whether every frame behind the one of AVI's `start` is also shown behind it."""
    packet = next((packet for packet in container.demux(stream) if packet.size), None)
    if packet is None or packet.dts != start:
        return False
    context = stream.codec_context
    if context.name == "h264":
        return _IDR.search(bytes(packet)) is not None
    context.decode(packet)
    return context.reorder_depth == 0


def _is_avi(container: InputContainer) -> bool:
    return container.format.name == "avi"
