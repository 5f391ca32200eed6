"""Tar headers, read strictly.

`tarfile` (and WebDataset on top of it) takes a damaged header in the middle for the end of the
archive and silently loses the rest of the shard. Here a defect is an error, and a header's claims
are checked against the file before anything is read for them.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from tarfile import AREGTYPE, DIRTYPE, NUL, REGTYPE, HeaderError, TarInfo
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_GNU_LONG_NAME, _PAX, _PAX_GLOBAL = b"L", b"x", b"g"
_MAX_EXTENDED_HEADER = 1 << 20
_MAX_NAME = 4096


class ShardError(ValueError):
    """A shard that is damaged, unsafe or not what its catalogue says. The message names it."""


class Span(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


def tar_members(file: BinaryIO, path: Path) -> Iterator[tuple[str, Span]]:
    """Regular files of a tar as (name, span); a defect is an error, never a shorter list."""
    end = os.fstat(file.fileno()).st_size
    position, long_name, overrides = 0, None, {}
    while True:
        header = os.pread(file.fileno(), _BLOCK, position)
        if len(header) < _BLOCK:
            raise ShardError(
                f"{path}: cut at byte {end}: no end mark; copy or make the shard again"
            )
        if header == NUL * _BLOCK:
            _check_padding(file, path, position, end)
            return
        try:
            info = TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except HeaderError as error:
            raise ShardError(f"{path}: damaged tar header at byte {position}: {error}") from error
        extends = info.type in (_GNU_LONG_NAME, _PAX, _PAX_GLOBAL)  # describes the next member
        size = info.size if extends else int(overrides.get("size", info.size))
        start = position + _BLOCK
        if size < 0 or start + size > end:
            raise ShardError(
                f"{path}: cut at byte {end} inside {info.name!r}; copy or make it again"
            )
        position = start + -(-size // _BLOCK) * _BLOCK
        if extends:
            data = _extended_header(file, path, start, size)
            if info.type == _GNU_LONG_NAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == _PAX:
                overrides = _pax_records(data, path)
            continue
        name = str(overrides.get("path", long_name or info.name))
        long_name, overrides = None, {}
        name = _safe_name(name, path)
        if info.type == DIRTYPE:
            continue
        if info.type not in (REGTYPE, AREGTYPE):
            raise ShardError(
                f"{path}: member {name!r} is a link, device or special file; only files are read"
            )
        yield name, Span(start, size)


def _extended_header(file: BinaryIO, path: Path, start: int, size: int) -> bytes:
    if size > _MAX_EXTENDED_HEADER:
        raise ShardError(
            f"{path}: extended header of {size} bytes at byte {start}; 1 MiB is the limit"
        )
    return os.pread(file.fileno(), size, start)


def _pax_records(data: bytes, path: Path) -> dict[str, str | int]:
    """`path` and `size` of a pax header made of "length key=value\\n" records."""
    found: dict[str, str | int] = {}
    while data.rstrip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not space or not _is_number(length) or not len(length) + 2 < int(length) <= len(data):
            raise ShardError(f"{path}: damaged pax header")
        key, equals, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if not equals or (key == b"size" and not _is_number(value)):
            raise ShardError(f"{path}: damaged pax header")
        if key.startswith(b"GNU.sparse."):
            raise ShardError(f"{path}: holds a sparse file; make the shard again without --sparse")
        if key == b"path":
            found["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            found["size"] = int(value)
        data = data[int(length) :]
    return found


def _is_number(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) <= 20  # of 64 bits; int() refuses thousands of digits


def _safe_name(name: str, path: Path) -> str:
    if len(name) > _MAX_NAME:
        raise ShardError(f"{path}: a member's name has {len(name)} characters, over {_MAX_NAME}")
    while name.startswith("./"):
        name = name[2:]
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or "\\" in name:
        raise ShardError(
            f"{path}: member {name!r} has an absolute or '..' name; such tars are refused"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ShardError(f"{path}: member {name!r} has a name that is not UTF-8") from None
    return name.rstrip("/")


def _check_padding(file: BinaryIO, path: Path, position: int, end: int) -> None:
    file.seek(position)
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise ShardError(
                f"{path}: data follows the end mark at byte {position} of {end}: "
                "joined tars are not read past the first; make them separate shards"
            )
