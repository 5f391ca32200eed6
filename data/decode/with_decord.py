"""Frames by presentation time through decord, for comparison and for those who trust it.

It exists for Linux on x86-64 only and cannot read AV1. Still pictures go through PyAV (decord reads
none of them).
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from longtake.data.decode.containers import DecodeError
from longtake.data.decode.pixels import Turn, check_shown, scale_pictures
from longtake.data.decode.source import (
    HeaderLimits,
    Timeline,
    is_image,
    open_video,
    read_timeline,
    video_streams,
)
from longtake.data.decode.with_pyav import decode_pyav, first_look


def decode_decord(
    data: bytes,
    times: Sequence[float],
    size: tuple[int, int] | None,
    limits: HeaderLimits,
    resize: str,
    frame_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """`decode_clip` of decord: RGB uint8 (T, H, W, 3), one thread, scaled while decoding.

    PyAV reads the packets and the first frame beforehand, because decord notices neither truncation
    nor sizes over the limits.
    """
    decord = _import_decord()
    with open_video(data, limits) as (container, stream):
        if is_image(container):
            return decode_pyav(data, times, size, limits, resize, frame_size)
        if stream.codec_context.codec.canonical_name == "av1":
            raise DecodeError("decord cannot read AV1; choose data.decoder=auto")
        # It takes the one that FFmpeg likes best; the number of frames then tells which that was.
        if sum(other.frames == stream.frames for other in video_streams(container)) > 1:
            raise DecodeError("decord cannot choose among video streams; use data.decoder=auto")
        timeline = read_timeline(data, container, stream, limits)
        first = first_look(data, container, stream, timeline, limits)
        is_avi = container.format.name == "avi"
    check_shown(first.size, frame_size)
    if first.turn.is_mirrored:
        raise DecodeError("decord cannot mirror frames; use data.decoder=auto")
    indices = timeline.indices(times).tolist()
    height, width = size or first.size
    # 0.6.0 breaks pictures that it turns and scales, and batches of those that it turns.
    scales = resize == "fast" and first.turn == Turn()
    try:
        reader = decord.VideoReader(
            io.BytesIO(data),
            ctx=decord.cpu(0),
            num_threads=1,
            **({"width": width, "height": height} if scales else {}),
        )
        if len(reader) != len(timeline.pts):
            raise DecodeError(f"decord sees {len(reader)} of {len(timeline.pts)} frames")
        frames = _read(reader, indices, timeline, can_seek=not (is_avi or first.turn.transpose))
    except (decord.DECORDError, RuntimeError) as error:
        raise DecodeError(f"decord: {str(error).splitlines()[0]}") from error
    return frames if scales else scale_pictures(frames, (height, width), resize)


def _import_decord() -> Any:
    try:
        import decord
    except ImportError as error:
        raise ValueError(
            "data.decoder=decord: decord is not installed (it exists for Linux x86-64 only); "
            "install it or choose data.decoder=auto"
        ) from error
    return decord


def _read(reader: Any, indices: list[int], timeline: Timeline, can_seek: bool) -> np.ndarray:
    keyframes = np.searchsorted(timeline.pts, timeline.keyframes).tolist()
    if can_seek and list(reader.get_key_indices()) == keyframes:
        return reader.get_batch(indices).asnumpy()
    # It numbers keyframes in decoding order, so with open groups of pictures a seek lands on a
    # neighbour of the frame that was asked for: walk instead.
    wanted = set(indices)
    found = {}
    for index in range(max(wanted) + 1):
        frame = reader.next()
        if index in wanted:
            picture = frame.asnumpy()
            # Rows that it turned come with their padding, which it takes for channels.
            height, width = picture.shape[:2]
            rows = picture.reshape(height, -1)[:, : 3 * width]
            found[index] = rows.reshape(height, width, 3)
    return np.stack([found[index] for index in indices])
