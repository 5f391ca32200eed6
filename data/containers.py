"""What a file's own structure says, without FFmpeg: its container, and whether it is whole."""

import math
from collections.abc import Iterator

import numpy as np


class DecodeError(ValueError):
    """Bytes that cannot be read as the clip they claim to be; the message is the reason."""


def container_format(data: bytes) -> str:
    """FFmpeg's name of the format.

    Raises:
        DecodeError: none of those that are read here.
    """
    head = data[:16]
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP"):
        return "avi" if head[8:12] == b"AVI " else "webp_pipe"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png_pipe"
    if head[:3] == b"\xff\xd8\xff":
        return "jpeg_pipe"
    if not data:
        raise DecodeError("empty file")
    raise DecodeError("unknown container: neither mp4/mov, mkv/webm, avi, png, jpg nor webp")


def check_jpeg(data: bytes) -> None:
    """A cut JPEG decodes to a picture whose lower part is grey; its end mark tells.

    Raises:
        DecodeError: the file ends before its end mark (ITU T.81, annex B).
    """
    position = 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 1:
        marker = data[position + 1]
        if marker == 0xD9:
            return
        if marker == 0xFF:  # filling
            position += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # no segment: pixels, restarts, starts
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise DecodeError("truncated: the JPEG has no end mark")


def count_left_out(data: bytes, name: str, stream: int) -> float:
    """Frames that a header may count although a whole file has no packets for them, at most.

    In AVI these are the dropped frames, chunks of no bytes, that its index lists. In MP4 an edit
    list may leave out any number, if the file is whole: boxes that fill it exactly, one of them
    with the media.
    """
    if name == "avi":
        start = data.rfind(b"idx1")
        if start < 0:
            return 0
        size = int.from_bytes(data[start + 4 : start + 8], "little") // 16 * 16
        body = data[start + 8 : start + 8 + size]
        if len(body) < size:
            return 0
        entries = np.frombuffer(body, dtype=[("id", "S2"), ("", "V10"), ("size", "<u4")])
        return int(((entries["id"] == b"%02d" % stream) & (entries["size"] == 0)).sum())
    if name == "mov" and b"elst" in data:
        boxes = list(_boxes(data))
        if all(whole for _, whole in boxes) and [kind for kind, _ in boxes].count(b"mdat") == 1:
            return math.inf
    return 0


def _boxes(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Kind of each top-level box of an MP4 and whether all of it is there (ISO 14496-12)."""
    position = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        # Size 0 means to the end of the file, which says nothing about where that was.
        whole = 8 <= size <= len(data) - position
        yield data[position + 4 : position + 8], whole
        position += size if whole else len(data)
