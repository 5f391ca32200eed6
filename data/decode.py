"""Video bytes to frames and back: the one door to PyAV and decord.

Frames are chosen by presentation time, so variable frame rates, non-zero starts and edit lists need
no care from callers. Container formats are named by magic bytes, never guessed by FFmpeg: a member
that is really a playlist could otherwise make it open other files or URLs.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from longtake.data.containers import (
    DecodeError,
    check_jpeg,
    container_format,
    count_left_out,
)

DECODERS = ("auto", "pyav", "decord")
VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "mov", "avi")
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")

# A frame is on display from its time until the next one's; a request this much early still gets it.
_TIME_SLACK = 1e-3  # seconds: above rounding of float32 rates, below a frame at 240 fps
_RESIZE = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class HeaderLimits:
    """What a header may claim before a decoder allocates for it."""

    max_side: int = 8192
    max_pixels: int = 8192 * 4320
    max_frames: int = 1_000_000


@dataclass(frozen=True)
class VideoInfo:
    """What packets and header say, without decoding. Times in seconds; an image has fps 0."""

    frames: int
    fps: float
    width: int
    height: int
    duration: float
    codec: str
    keyframe_interval: float
    start_time: float


@dataclass(frozen=True)
class _Timeline:
    """Presentation times of a stream's frames, in ticks of `time_base`, sorted."""

    pts: np.ndarray  # (N,) int64
    keyframes: np.ndarray  # (K,) int64
    end: int
    time_base: float

    def indices(self, times: Sequence[float]) -> np.ndarray:
        """(T,) index of the frame on display at each time from the clip's start."""
        ticks = np.asarray(times, dtype=np.float64) / self.time_base
        slack = _TIME_SLACK / self.time_base
        length = self.end - self.pts[0]
        if len(ticks) and (ticks.min() < -slack or ticks.max() >= length):
            raise DecodeError(
                f"clip lasts {length * self.time_base:.3f} s, "
                f"frames at {min(times):.3f} to {max(times):.3f} s were asked for"
            )
        found = np.searchsorted(self.pts - self.pts[0], ticks + slack, side="right") - 1
        return np.maximum(found, 0)


def probe(data: bytes, *, limits: HeaderLimits | None = None) -> VideoInfo:
    """Size, rate, length and codec of a video or image, from header and packets.

    Raises:
        DecodeError: unknown container, no video stream, header over the limits, truncated file.
    """
    limits = limits or HeaderLimits()
    with _opened(data, limits) as (container, stream):
        timeline = _timeline(data, container, stream, limits)
        context = stream.codec_context
        is_image = container.format.name.endswith("_pipe")
        duration = 0.0 if is_image else (timeline.end - timeline.pts[0]) * timeline.time_base
        return VideoInfo(
            frames=len(timeline.pts),
            fps=0.0 if is_image else _rate(stream, timeline),
            width=context.width,
            height=context.height,
            duration=float(duration),
            codec=context.codec.canonical_name,
            keyframe_interval=float(duration / max(len(timeline.keyframes), 1)),
            start_time=float(timeline.pts[0] * timeline.time_base),
        )


def decode_clip(
    data: bytes,
    times: Sequence[float],
    *,
    decoder: str = "auto",
    size: tuple[int, int] | None = None,
    limits: HeaderLimits | None = None,
) -> np.ndarray:
    """Frames on display at `times` (seconds from the first frame), RGB uint8 (T, H, W, 3).

    `size` = (height, width) resizes while converting. `auto` is PyAV: it reads every codec tried,
    and random windows 1.3-1.7 times as fast as decord, which cannot read AV1.

    Raises:
        DecodeError: nothing but the whole clip is ever returned.
        ValueError: unknown or absent decoder.
    """
    limits = limits or HeaderLimits()
    if decoder not in DECODERS:
        raise ValueError(f"data.decoder={decoder!r} must be one of {', '.join(DECODERS)}")
    if not len(times):
        raise ValueError("times is empty; ask for at least one frame")
    if decoder == "decord":
        return _decode_decord(data, times, size, limits)
    return _decode_pyav(data, times, size, limits)


def encode_video(
    frames: np.ndarray,
    fps: float,
    *,
    crf: int = 10,
    pixel_format: str = "yuv444p",
    gop: int | None = None,
) -> bytes:
    """Frames uint8 (T, H, W, 3) to mp4 (H.264), the same bytes on every call.

    yuv444p because 4:2:0 costs small saturated shapes 15 dB at any quality. One thread: x264 cuts
    frames by thread count. `gop` is the longest keyframe distance in frames, 30 by default.
    """
    height, width = _check_frames(frames)
    if min(height, width) < 16 or (pixel_format == "yuv420p" and (height % 2 or width % 2)):
        raise ValueError(
            f"{width}x{height} {pixel_format}: H.264 needs sides >= 16, and even ones for yuv420p"
        )
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps} must be a positive number")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.options = {
            "crf": str(crf),
            "g": str(gop or 30),
            "threads": "1",
            "tune": "psnr",
            # x264's mb-tree reads memory it never wrote where frames are a few blocks wide, and the
            # bytes then change from call to call.
            "x264-params": "chroma-qp-offset=-6:mbtree=0",
        }
        reformatter = VideoReformatter()
        for array in frames:
            rgb = VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = reformatter.reformat(
                rgb,
                format=pixel_format,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_RESIZE,
                threads=1,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_image(frame: np.ndarray) -> bytes:
    """One frame uint8 (H, W, 3) to PNG, without loss."""
    _check_frames(frame[None])
    encoder: Any = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.shape[1], frame.shape[0], "rgb24"
    encoder.time_base = Fraction(1, 25)
    rgb = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(rgb), *encoder.encode(None)])


def _check_frames(frames: np.ndarray) -> tuple[int, int]:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"frames {frames.shape} {frames.dtype}: must be uint8 (T, H, W, 3) with T >= 1"
        )
    return frames.shape[1], frames.shape[2]


@contextmanager
def _opened(data: bytes, limits: HeaderLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream; every FFmpeg error inside becomes a DecodeError."""
    name = container_format(data)
    if name == "jpeg_pipe":
        check_jpeg(data)
    try:
        with av.open(
            io.BytesIO(data),
            format=name,
            options={"max_pixels": str(limits.max_pixels)},
            metadata_errors="replace",
        ) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise DecodeError("no video stream")
            context = stream.codec_context
            if context is None:
                raise DecodeError("no decoder for its codec")
            width, height = context.width, context.height
            if width < 1 or height < 1:
                raise DecodeError("its header gives no frame size: damaged or truncated")
            if max(width, height) > limits.max_side or width * height > limits.max_pixels:
                raise DecodeError(f"frame size {width}x{height} is over the limit")
            context.thread_count = 1
            yield container, stream
    except DecodeError:
        raise
    except (av.FFmpegError, EOFError, OverflowError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DecodeError(f"damaged or truncated: {reason}") from error


def _timeline(
    data: bytes, container: InputContainer, stream: VideoStream, limits: HeaderLimits
) -> _Timeline:
    """Reads all packets (no decoding), which also shows whether the file is whole."""
    pts, keyframes, end, packets = [], [], 0, 0
    counts_frames = stream.frames > 0
    longest = 0.0  # seconds, over every stream
    for packet in container.demux(*([stream] if counts_frames else [])):
        if not packet.size:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None or packet.time_base is None:
            time = packets
        stop = time + (packet.duration or 0)
        longest = max(longest, float(stop * (packet.time_base or 0)))
        if packet.stream_index != stream.index:
            continue
        packets += 1
        if packets > limits.max_frames:
            raise DecodeError(f"more than {limits.max_frames} frames")
        if packet.is_corrupt:
            raise DecodeError("damaged packet")
        if not packet.is_discard:
            pts.append(time)
            end = max(end, stop)
            if packet.is_keyframe:
                keyframes.append(time)
    if not pts:
        raise DecodeError("no frames")
    missing = stream.frames - packets
    if missing > 0 and missing > count_left_out(data, container_format(data), stream.index):
        raise DecodeError(f"truncated: {packets} of {stream.frames} frames")
    claimed = (container.duration or 0) / 1e6  # AV_TIME_BASE
    if not counts_frames and claimed > 0 and longest < 0.99 * claimed - 0.1:
        raise DecodeError(f"truncated: {longest:.2f} of {claimed:.2f} s")
    times = np.unique(np.asarray(pts, dtype=np.int64))
    if end <= times[-1]:  # the last packet carries no duration: as long as the others
        end = int(times[-1]) + max(1, round((times[-1] - times[0]) / max(len(times) - 1, 1)))
    return _Timeline(times, np.sort(np.asarray(keyframes)), end, float(stream.time_base or 1))


def _rate(stream: VideoStream, timeline: _Timeline) -> float:
    """Mean frame rate: the header's exact fraction where the packets agree with it."""
    span = (timeline.end - timeline.pts[0]) * timeline.time_base
    measured = len(timeline.pts) / span if span > 0 else 0.0
    claimed = float(stream.average_rate or 0)
    return claimed if abs(claimed - measured) <= 0.01 * measured else float(measured)


def _decode_pyav(
    data: bytes, times: Sequence[float], size: tuple[int, int] | None, limits: HeaderLimits
) -> np.ndarray:
    with _opened(data, limits) as (container, stream):
        timeline = _timeline(data, container, stream, limits)
    wanted = timeline.pts[timeline.indices(times)]
    earlier = timeline.keyframes[timeline.keyframes <= wanted.min()]
    # AVI stores no presentation times, and FFmpeg numbers its frames as they are decoded, which is
    # wrong for B-frames: there the k-th frame that comes out has the k-th time.
    in_order = timeline.pts if container_format(data) == "avi" else None
    # A seek may land behind an open group of pictures; then decode from the start.
    seeks = [int(earlier[-1])] if len(earlier) > 1 and in_order is None else []
    found = {}
    for seek in [*seeks, None]:
        found = _frames_at(data, set(wanted.tolist()), seek, size, limits, in_order)
        if len(found) == len(set(wanted.tolist())):
            break
    missing = [t for t, pts in zip(times, wanted.tolist(), strict=True) if pts not in found]
    if missing:
        raise DecodeError(f"frame at {missing[0]:.3f} s cannot be decoded")
    if len({frame.shape for frame in found.values()}) > 1:
        raise DecodeError("the frame size changes inside the clip")
    return np.stack([found[pts] for pts in wanted.tolist()])  # (T, H, W, 3)


def _frames_at(
    data: bytes,
    wanted: set[int],
    seek: int | None,
    size: tuple[int, int] | None,
    limits: HeaderLimits,
    in_order: np.ndarray | None = None,
) -> dict[int, np.ndarray]:
    """Decoded RGB frames by their time stamps, as far as they can be decoded without a flaw.

    `in_order` (N,) are the times of all frames, for files whose own time stamps are worthless.
    """
    found: dict[int, np.ndarray] = {}
    height, width = size or (None, None)
    reformatter = VideoReformatter()
    with _opened(data, limits) as (container, stream):
        if seek is not None:
            container.seek(seek, stream=stream)
        for number, frame in enumerate(container.decode(stream)):
            time = frame.pts if frame.pts is not None else frame.dts
            if in_order is not None:
                time = int(in_order[number]) if number < len(in_order) else None
            if time is None:
                time = 0
            if time in wanted and time not in found:
                if frame.is_corrupt:
                    raise DecodeError(f"damaged frame at {float(time * stream.time_base):.3f} s")
                found[time] = _to_rgb(frame, reformatter, width, height)
            if len(found) == len(wanted):
                break
    return found


def _to_rgb(
    frame: VideoFrame, reformatter: VideoReformatter, width: int | None, height: int | None
) -> np.ndarray:
    """RGB uint8 (H, W, 3). Untagged video is taken for BT.601, as players and decord do."""
    rgb = reformatter.reformat(
        frame, width, height, format="rgb24", interpolation=_RESIZE, threads=1
    )
    return rgb.to_ndarray()


def _decode_decord(
    data: bytes, times: Sequence[float], size: tuple[int, int] | None, limits: HeaderLimits
) -> np.ndarray:
    try:
        import decord
    except ImportError as error:
        raise ValueError(
            "data.decoder=decord: decord is not installed (it exists for Linux x86-64 only); "
            "install it or choose data.decoder=auto"
        ) from error
    with _opened(data, limits) as (container, stream):
        timeline = _timeline(data, container, stream, limits)  # decord does not notice truncation
    indices = timeline.indices(times)
    height, width = size or (-1, -1)
    try:
        reader = decord.VideoReader(
            io.BytesIO(data), ctx=decord.cpu(0), width=width, height=height, num_threads=1
        )
        if len(reader) != len(timeline.pts):
            raise DecodeError(f"decord sees {len(reader)} of {len(timeline.pts)} frames")
        keyframes = np.searchsorted(timeline.pts, timeline.keyframes).tolist()
        seekable = container_format(data) != "avi"  # see _decode_pyav
        if seekable and list(reader.get_key_indices()) == keyframes:
            return reader.get_batch(indices.tolist()).asnumpy()
        # It numbers keyframes in decoding order, so with open groups of pictures a seek lands on
        # a neighbour of the frame that was asked for: walk instead.
        wanted = set(indices.tolist())
        found = {}
        for index in range(max(wanted) + 1):
            frame = reader.next()
            if index in wanted:
                found[index] = frame.asnumpy()
        return np.stack([found[index] for index in indices.tolist()])
    except (decord.DECORDError, RuntimeError) as error:
        raise DecodeError(f"decord: {str(error).splitlines()[0]}") from error
