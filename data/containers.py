"""Which container some bytes are, by their magic numbers alone."""


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
