"""Clips written with their own frame times and sound, and files rewritten without sound."""

import io
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.audio.stream import AudioStream
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from longtake.data.decode.containers import DecodeError, container_format
from longtake.data.decode.source import HeaderLimits, open_video

ENCODER = f"PyAV {av.__version__}"  # another one may encode to other bytes
FFmpegError = av.FFmpegError
_TICKS = 90_000  # of a second, at least: times are kept to 6 µs
_COPIED_SOUND = ("aac", "mp3", "ac3", "eac3", "opus", "alac")  # what MP4 holds


class ClipEncoder:
    """H.264 in MP4 of frames with their own times, the same bytes on every call."""

    def __init__(
        self,
        size: tuple[int, int],
        fps: float,
        *,
        crf: int,
        gop: int,
        pixel_format: str,
        sound: "Sound | None",
    ) -> None:
        """`size` is (height, width), `gop` the longest keyframe distance in frames."""
        rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
        # A multiple of the rate: the times of a constant one are then exact.
        self._time_base = Fraction(1, rate.numerator * math.ceil(_TICKS / rate.numerator))
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4")
        stream = self._container.add_stream("libx264", rate=rate)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        context = stream.codec_context
        context.time_base = stream.time_base = self._time_base
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        stream.options = {
            "crf": str(crf),
            "g": str(gop),
            # Frames are cut by thread count; files are encoded side by side anyway.
            "threads": "1",
            # Halves the time of decoding for a tenth more bytes: no arithmetic coding, deblocking
            # nor weighted prediction, and three frames of four are referred to by none, so that
            # readers of every other frame can pass over them. mb-tree reads memory that x264 never
            # wrote, and the bytes would change from call to call.
            "tune": "fastdecode",
            "x264-params": "bframes=3:b-adapt=0:b-pyramid=none:mbtree=0",
        }
        self._stream, self._sound = stream, sound
        self._sound_out = sound.add_to(self._container) if sound else None
        self._reformatter = VideoReformatter()

    def add(self, array: np.ndarray | None, time: float, duration: float) -> None:
        """A frame (H, W, 3), on display for `duration` from `time` on, in seconds."""
        if array is None:
            raise DecodeError("ends before its last frame")
        frame = self._reformatter.reformat(
            VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24"),
            format=self._stream.pix_fmt,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC
            | Interpolation.ACCURATE_RND
            | Interpolation.FULL_CHR_H_INT,
            threads=1,
        )
        frame.time_base = self._time_base
        frame.pts = round(time / self._time_base)
        frame.duration = round(duration / self._time_base)
        self._container.mux(self._stream.encode(frame))

    def finish(self, start: float, stop: float) -> bytes:
        """The file, with the sound of [start, stop) seconds."""
        self._container.mux(self._stream.encode())
        if self._sound and self._sound_out:
            for packet in self._sound.packets(start, stop, self._sound_out):
                self._container.mux(packet)
        self._container.close()
        return self._buffer.getvalue()


class Sound:
    """The sound of a file, handed out part by part; packets are never cut (AAC's last 21 ms)."""

    def __init__(self, data: bytes, origin: float) -> None:
        """`origin` is the time of the first frame in the container, in seconds."""
        self._container = av.open(
            io.BytesIO(data), format=container_format(data), metadata_errors="replace"
        )
        stream = self._container.streams.best("audio")
        self._stream = stream if isinstance(stream, AudioStream) else None
        if self._stream and self._stream.codec_context is None:
            raise DecodeError("no decoder for its sound; use --audio drop")
        self._origin = origin
        self._is_copied = bool(stream) and stream.codec_context.name in _COPIED_SOUND
        self._queue = self._timed()
        self._next = next(self._queue, None)

    def add_to(self, container: Any) -> AudioStream | None:
        """A stream of `container` for it; what MP4 cannot hold becomes AAC."""
        if self._stream is None:
            return None
        if self._is_copied:
            return container.add_stream_from_template(self._stream)
        return container.add_stream("aac", rate=self._stream.codec_context.sample_rate)

    def packets(self, start: float, stop: float, out: AudioStream) -> Iterator[Packet]:
        """Packets that begin in [start, stop) seconds, with times from `start`."""
        while self._next is not None and self._next[0] < stop:
            time, item = self._next
            self._next = next(self._queue, None)
            if time < start or item.time_base is None:
                continue
            shift = round((self._origin + start) / item.time_base)
            item.pts = (item.pts or 0) - shift
            if isinstance(item, Packet):
                item.dts, item.stream = item.pts, out
                yield item
            else:
                yield from out.encode(item)
        if not self._is_copied:
            yield from out.encode(None)

    def _timed(self) -> Iterator[tuple[float, Any]]:
        """(seconds from the first frame, packet or decoded frame)."""
        if self._stream is None:
            return
        for packet in self._container.demux(self._stream):
            for item in [packet] if self._is_copied else packet.decode():
                if item.pts is not None and (not isinstance(item, Packet) or item.size):
                    yield float(item.pts * (item.time_base or 0)) - self._origin, item


def without_sound(data: bytes, ext: str) -> bytes:
    """The same packets without those of other streams."""
    muxers = {"mov": ext if ext == "mov" else "mp4", "avi": "avi"}
    muxer = muxers.get(container_format(data), "webm" if ext == "webm" else "matroska")
    buffer = io.BytesIO()
    with open_video(data, HeaderLimits()) as (source, video):
        if not source.streams.audio:
            return data
        with av.open(buffer, "w", format=muxer) as out:
            stream = out.add_stream_from_template(video)
            for packet in source.demux(video):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    return buffer.getvalue()
