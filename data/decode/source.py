"""What a video's bytes hold: the stream to decode, the times of its frames, its claims."""

import errno
import io
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from longtake.data.decode.containers import (
    DecodeError,
    check_jpeg,
    container_format,
    count_left_out,
)

# A frame is on display from its time until the next one's; a request this much early still gets it.
_TIME_SLACK = 1e-3  # seconds: above rounding of float32 rates, below a frame at 240 fps
_FEW_FRAMES = 64  # reading so many packets costs half a millisecond
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


@dataclass(frozen=True)
class HeaderLimits:
    """What a header may claim before a decoder allocates for it."""

    max_side: int = 8192
    max_pixels: int = 8192 * 4320
    max_frames: int = 1_000_000

    def check_size(self, width: int, height: int) -> None:
        """Raises DecodeError where a frame is larger than this, or nothing."""
        if width < 1 or height < 1:
            raise DecodeError("its header gives no frame size: damaged or truncated")
        if max(width, height) > self.max_side or width * height > self.max_pixels:
            raise DecodeError(f"frame size {width}x{height} is over the limit")


@dataclass(frozen=True)
class Timeline:
    """Presentation times of a stream's frames, in ticks of `time_base` seconds, sorted."""

    pts: np.ndarray  # (N,) int64
    keyframes: np.ndarray  # (K,) int64, also those that an edit list leaves out
    end: int
    time_base: float
    is_whole: bool = True  # or only the first frame and those around a window

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last one."""
        return float((self.end - self.pts[0]) * self.time_base)

    @property
    def seconds(self) -> np.ndarray:
        """(N,) when each frame begins, from the first one on."""
        return (self.pts - self.pts[0]) * self.time_base

    def indices(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """(T,) index of the frame on display at each time from the clip's start.

        Raises:
            DecodeError: a time outside the clip, or no number.
        """
        ticks = np.asarray(times, dtype=np.float64) / self.time_base
        slack = _TIME_SLACK / self.time_base
        length = self.end - self.pts[0]
        if not (ticks.min() >= -slack and ticks.max() < length):
            raise DecodeError(
                f"clip lasts {length * self.time_base:.3f} s, "
                f"frames at {min(times):.3f} to {max(times):.3f} s were asked for"
            )
        found = np.searchsorted(self.pts - self.pts[0], ticks + slack, side="right") - 1
        return np.maximum(found, 0)


@contextmanager
def open_video(data: bytes, limits: HeaderLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream; every FFmpeg error inside becomes a DecodeError.

    The codec whitelist keeps FFmpeg from decoding while it opens the file, which costs 12 ms at
    720p and happens before any limit holds; what only the codec knows, the first frame tells.
    """
    name = container_format(data)
    if name == "jpeg_pipe":
        check_jpeg(data)
    try:
        with av.open(
            io.BytesIO(data),
            format=name,
            options={"codec_whitelist": "none"},
            metadata_errors="replace",
        ) as container:
            stream = _best_stream(container)
            context = stream.codec_context
            if context.width or context.height:
                limits.check_size(context.width, context.height)
            if stream.frames > limits.max_frames:
                raise DecodeError(f"more than {limits.max_frames} frames")
            context.thread_count = 1
            context.options = {"max_pixels": str(limits.max_pixels)}
            if is_image(container):  # a damaged JPEG is otherwise filled up in silence
                context.options |= {"err_detect": "explode"}
            elif context.name == "h264":
                # A stream that does not say how far it reorders frames then counts as reordering
                # at most; else the decoder puts some out too early, learns, and loses others.
                context.options |= {"strict": "strict"}
            yield container, stream
    except DecodeError:
        raise
    except MemoryError:
        raise DecodeError("asks for more memory than there is") from None
    except (av.FFmpegError, EOFError, OverflowError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        # FFmpeg has one word for nonsense and for frames of more pixels than allowed.
        known = "damaged or truncated"
        if getattr(error, "errno", None) == errno.EINVAL:
            known = f"damaged, or over the limit of {limits.max_pixels} pixels"
        raise DecodeError(f"{known}: {reason}") from error


def is_image(container: InputContainer) -> bool:
    """Whether the file is a still picture."""
    return container.format.name.endswith("_pipe")


def video_streams(container: InputContainer) -> list[VideoStream]:
    """Streams of moving pictures: cover art and thumbnails are left out."""
    return [s for s in container.streams.video if not s.disposition & _PICTURES]


def _best_stream(container: InputContainer) -> VideoStream:
    streams = video_streams(container)
    if not streams:
        raise DecodeError("no video stream")
    # Without a decoder PyAV gives no context, whatever its annotations say.
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise DecodeError("no decoder for its codec")

    def rank(stream: VideoStream) -> tuple[bool, int]:
        context = stream.codec_context
        return bool(stream.disposition & Disposition.default), context.width * context.height

    return max(known, key=rank)


def read_timeline(
    data: bytes, container: InputContainer, stream: VideoStream, limits: HeaderLimits
) -> Timeline:
    """Reads all packets (no decoding), which also shows whether the file is whole.

    Raises:
        DecodeError: truncated, damaged, empty, or more frames than the limit.
    """
    pts, keyframes = array("q"), array("q")
    end, packets, longest = 0, 0, 0.0  # longest: seconds, over every stream
    counts_frames = stream.frames > 0
    hides_frames = stream.codec_context.name == "vp8"
    for packet in container.demux(*([stream] if counts_frames else [])):
        if not packet.size:
            continue
        time = packet.pts
        if time is None:
            time = packet.dts if packet.dts is not None else packets
        stop = time + (packet.duration or 0)
        if not counts_frames:
            longest = max(longest, float(stop * (packet.time_base or 0)))
            if packet.stream_index != stream.index:
                continue
        packets += 1
        if packets > limits.max_frames:
            raise DecodeError(f"more than {limits.max_frames} frames")
        if packet.is_corrupt:
            raise DecodeError("damaged packet")
        if packet.is_keyframe:
            keyframes.append(time)
        # VP8 has packets that are never shown: bit 4 of the frame tag is show_frame (RFC 6386).
        if not packet.is_discard and not (hides_frames and not memoryview(packet)[0] & 0x10):
            pts.append(time)
            end = max(end, stop)
    if not pts:
        raise DecodeError("no frames")
    missing = stream.frames - packets
    if missing > 0 and missing > count_left_out(data, container_format(data), stream.index):
        raise DecodeError(f"truncated: {packets} of {stream.frames} frames")
    claimed = (container.duration or 0) / 1e6  # AV_TIME_BASE
    if not counts_frames and claimed > 0 and longest < 0.99 * claimed - 0.1:
        raise DecodeError(f"truncated: {longest:.2f} of {claimed:.2f} s")
    times = np.unique(np.frombuffer(pts, np.int64))
    if end <= times[-1]:  # the last packet carries no duration: as long as the others
        end = int(times[-1]) + max(1, round((times[-1] - times[0]) / max(len(times) - 1, 1)))
    keys = np.sort(np.frombuffer(keyframes, np.int64))
    return Timeline(times, keys, end, float(stream.time_base or 1))


def frame_times(data: bytes) -> np.ndarray:
    """(N,) presentation times in seconds from the first frame, those of `iter_frames` in order.

    Raises:
        DecodeError: as of `probe`.
    """
    with open_video(data, limits := HeaderLimits()) as (container, stream):
        return read_timeline(data, container, stream, limits).seconds


def is_worth_a_window(container: InputContainer, stream: VideoStream) -> bool:
    """Whether the file is a long MP4, whose index finds a window without reading all packets."""
    return "mov" in container.format.name and stream.frames > _FEW_FRAMES


def read_window(
    container: InputContainer, stream: VideoStream, times: Sequence[float]
) -> Timeline | None:
    """The part of an MP4's timeline that `times` (seconds) need, by the file's own index: a window
    of a long clip costs no more than one of a short clip. None where the packets do not tell.

    Damage elsewhere in the file goes unnoticed here.

    Raises:
        DecodeError: a damaged packet, or times outside the clip.
    """
    base = float(stream.time_base or 1)
    origin = _first_time(container, stream)
    if origin is None:
        return None
    first, last = (origin + (t + _TIME_SLACK) / base for t in (min(times), max(times)))
    container.seek(int(first), stream=stream)
    pts, keyframes = array("q", [origin]), array("q")
    end = origin
    for packet in container.demux(stream):
        if not packet.size:
            continue
        time = packet.pts
        if time is None or packet.dts is None:
            return None
        if packet.is_corrupt:
            raise DecodeError("damaged packet")
        if not keyframes and not (packet.is_keyframe and time <= first):
            return None
        if packet.is_keyframe:
            keyframes.append(time)
        if not packet.is_discard:
            pts.append(time)
            end = max(end, time + (packet.duration or 0))
        if packet.dts > last:  # nothing that follows is shown earlier
            end = max(end, int(last) + 1)
            break
    shown = np.unique(np.frombuffer(pts, np.int64))
    keys = np.sort(np.frombuffer(keyframes, np.int64))
    return Timeline(shown, keys, end, base, is_whole=False) if len(keys) else None


def _first_time(container: InputContainer, stream: VideoStream) -> int | None:
    """Time stamp of the first frame that is shown; None where the first packets do not tell."""
    first = None
    for packet in islice(container.demux(stream), _FEW_FRAMES):
        if packet.pts is None or packet.dts is None:
            return None
        if first is not None and packet.dts > first:
            return first
        if not packet.is_discard:
            first = packet.pts if first is None else min(first, packet.pts)
    return None


def frame_rate(stream: VideoStream, timeline: Timeline) -> float:
    """Mean frames per second: the header's exact fraction where the packets agree with it."""
    span = timeline.duration
    measured = len(timeline.pts) / span if span > 0 else 0.0
    claimed = float(stream.average_rate or 0)
    return claimed if abs(claimed - measured) <= 0.01 * measured else float(measured)
