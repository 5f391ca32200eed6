"""Decoding a whole clip to see that it can be: `longtake verify` and `longtake index --probe full`.

A header promises more than a decoder keeps: packets may be there and hold nothing. The decoding is
done in a child that can be killed, as nothing is known yet of these clips.
"""

from dataclasses import dataclass
from functools import cache

from longtake.data.decode.guard import DecodeGuard
from longtake.data.decode.source import frame_times

TIMEOUT = 120.0  # seconds for each FRAMES frames
MAX_MEMORY = 4 * 2**30
FRAMES, SIZE = 128, (32, 32)  # decoded in one call, and made small: nobody looks at them


@dataclass(frozen=True)
class Decoded:
    """What came out of a decoder: number of frames, and their size on display."""

    frames: int
    width: int
    height: int


def decode_all(data: bytes) -> Decoded:
    """Decode every frame, each asked for by its own presentation time.

    Raises:
        DecodeError: a frame is damaged, missing or of another size than the first; or the decoder
            takes too long or too much memory.
    """
    times = frame_times(data)
    guard = _guard()
    _, height, width, _ = guard.decode_clip(data, [0.0]).shape
    for first in range(0, len(times), FRAMES):
        guard.decode_clip(data, times[first : first + FRAMES].tolist(), size=SIZE)
    return Decoded(len(times), width, height)


@cache
def _guard() -> DecodeGuard:
    """One child for each process; a forked copy starts its own."""
    return DecodeGuard(TIMEOUT, MAX_MEMORY)
