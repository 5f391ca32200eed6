"""What a file's own structure says, without FFmpeg: its container, and whether it is whole."""

import math
import re
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


_EXIF = re.compile(rb"(?:Exif\0\0|eXIf|EXIF....(?:Exif\0\0)?)(II\*\0|MM\0\*)", re.DOTALL)
_UPRIGHT = (1 << 16, 0, 0, 1 << 16)  # 16.16 fixed point
_ORIENTATION = 0x112


def exif_orientation(data: bytes) -> int:
    """The tag Orientation of a JPEG, PNG or WebP, 1 (upright) where there is none (EXIF 2.32)."""
    found = _EXIF.search(data)
    if found is None:
        return 1
    order = "little" if found[1][:1] == b"I" else "big"
    start = found.start(1)

    def number(position: int, size: int) -> int:
        return int.from_bytes(data[start + position : start + position + size], order)

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if number(entry, 2) == _ORIENTATION:
            return number(entry + 8, 2)
    return 1


def track_matrix(data: bytes, track: int) -> tuple[int, int, int, int] | None:
    """a, b, c, d of the display matrix of an MP4's track (ISO 14496-12, 8.3.2); None where the
    file does not say, or where the movie has a matrix of its own."""
    found = None
    for kind, start, stop in _inside(data, 0, len(data), b"moov"):
        if kind == b"mvhd" and _matrix(data, start, stop, 36) != _UPRIGHT:
            return None
        for inner, first, last in _inside(data, start, stop) if kind == b"trak" else ():
            offset = first + (20 if data[first : first + 1] == b"\x01" else 12)
            if inner == b"tkhd" and data[offset : offset + 4] == track.to_bytes(4, "big"):
                found = _matrix(data, first, last, 40)
    return found


def _inside(
    data: bytes, start: int, stop: int, within: bytes = b""
) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and stop of the body of each box between two places, or of those inside the box
    `within` there."""
    while start + 8 <= stop:
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        body = start + 8
        if size == 1:
            size, body = int.from_bytes(data[body : body + 8], "big"), body + 8
        end = start + size
        if end < body or end > stop:
            return
        if kind == within:
            yield from _inside(data, body, end)
        elif not within:
            yield kind, body, end
        start = end


def _matrix(data: bytes, start: int, stop: int, offset: int) -> tuple[int, int, int, int] | None:
    """a, b, c, d of the matrix that lies `offset` bytes into a header box of version 0."""
    start += offset + (12 if data[start : start + 1] == b"\x01" else 0)
    if start + 36 > stop:
        return None
    a, b, _, c, d = np.frombuffer(data, ">i4", 5, start).tolist()
    return a, b, c, d


def count_left_out(data: bytes, name: str, stream: int) -> float:
    """Frames that a header may count although a whole file has no packets for them, at most.

    In AVI these are the dropped frames, chunks of no bytes, that its index lists. In MP4 an edit
    list may leave out any number, if the file is whole: boxes that fill it exactly, and in it all
    the chunks of media that its tables name.
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
        kinds = [kind for kind, _, _ in boxes]
        if all(whole for _, _, whole in boxes) and b"mdat" in kinds and b"moov" in kinds:
            start = boxes[kinds.index(b"moov")][1]
            if _has_all_chunks(data, start):
                return math.inf
    return 0


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, bool]]:
    """Kind and start of each top-level box of an MP4, whether all of it is there (ISO 14496-12)."""
    position = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        # Size 0 means to the end of the file, which says nothing about where that was.
        whole = 8 <= size <= len(data) - position
        yield data[position + 4 : position + 8], position, whole
        position += size if whole else len(data)


def _has_all_chunks(data: bytes, moov: int) -> bool:
    """Whether every chunk that the sample tables point to begins inside the file."""
    end = moov + int.from_bytes(data[moov : moov + 4], "big")
    for table in re.finditer(rb"stco|co64", data[moov:end]):
        kind = ">u4" if table[0] == b"stco" else ">u8"
        start = moov + table.end() + 4
        count = int.from_bytes(data[start : start + 4], "big")
        if count * np.dtype(kind).itemsize > end - start - 4:
            return False
        if (np.frombuffer(data, kind, count, start + 4) >= len(data)).any():
            return False
    return True
