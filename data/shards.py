"""Plain WebDataset tars: write, scan, read by offset.

The scan is strict and its own: `tarfile` (and WebDataset on top of it) takes a damaged header in
the middle for the end of the archive and silently loses the rest of the shard. Members are bytes;
nothing here decodes, unpickles or executes them.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import AREGTYPE, DIRTYPE, NUL, REGTYPE, HeaderError, TarInfo
from types import TracebackType
from typing import Any, BinaryIO, Self

# WebDataset opens `pipe:` URLs and unpickles members by default; its safe mode is read at import.
os.environ["WDS_SECURE"] = "1"

_BLOCK = 512
_GNU_LONG_NAME, _PAX, _PAX_GLOBAL = b"L", b"x", b"g"
_MAX_EXTENDED_HEADER = 1 << 20


class ShardError(ValueError):
    """A shard that is damaged, unsafe or not what its catalogue says. The message names it."""


@dataclass(frozen=True)
class Span:
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


@dataclass
class SampleEntry:
    """One sample of a shard: extension without its first dot -> span."""

    key: str
    members: dict[str, Span] = field(default_factory=dict)


class ShardWriter:
    """Writes samples into tars of at most `max_samples` samples and about `max_bytes` bytes.

    Equal samples give equal bytes (no times, no users). A tar gets its final name when it is whole;
    on an exception the tar being written is removed and the finished ones stay.
    """

    def __init__(
        self,
        out_dir: Path | str,
        *,
        max_samples: int = 500,
        max_bytes: int = 2**28,
        prefix: str = "shard",
        start: int = 0,
    ) -> None:
        if max_samples < 1 or max_bytes < 1:
            raise ValueError(
                f"max_samples={max_samples} and max_bytes={max_bytes} must be positive"
            )
        self.out_dir = Path(out_dir)
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.prefix, self.index = prefix, start
        self.paths: list[Path] = []
        self._keys: set[str] = set()
        self._bytes = 0
        self._file: BinaryIO | None = None
        self._tar: Any = None

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample: `members` maps extensions without the dot to bytes.

        Raises:
            ValueError: a key or extension that readers would split otherwise, or a repeated key.
            OSError: the disk is full; the unfinished tar is removed.
        """
        _check_name(key, members)
        size = sum(len(data) for data in members.values())
        full = len(self._keys) >= self.max_samples or self._bytes + size > self.max_bytes
        if self._keys and full:
            self._finish()
        if key in self._keys:
            raise ValueError(f"key={key!r} is written twice; keys of a shard must be unique")
        try:
            if self._tar is None:
                self._open()
            self._tar.write({"__key__": key, **members})
        except BaseException:
            self._discard()
            raise
        self._keys.add(key)
        self._bytes += size

    def close(self) -> None:
        """Finish the last tar."""
        if self._tar is not None:
            self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    @property
    def _final(self) -> Path:
        return self.out_dir / f"{self.prefix}-{self.index:06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self._final.with_suffix(".tar.tmp")

    def _open(self) -> None:
        from webdataset import TarWriter  # 1 s of import that readers never need

        self.out_dir.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed in _finish or _discard
        self._tar = TarWriter(
            self._file, user="", group="", mode=0o644, compress=False, encoder=False, mtime=0
        )

    def _finish(self) -> None:
        assert self._file is not None
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._final)
        except BaseException:
            self._discard()
            raise
        self.paths.append(self._final)
        self._tar, self._file = None, None
        self._keys, self._bytes = set(), 0
        self.index += 1

    def _discard(self) -> None:
        if self._file is not None:
            # Not TarWriter.close(): it would write the end mark, which a full disk refuses again.
            self._tar, file, self._file = None, self._file, None
            try:
                file.close()
            finally:
                self._temporary.unlink(missing_ok=True)


def _check_name(key: str, members: Mapping[str, bytes]) -> None:
    base = key.rsplit("/", 1)[-1]
    parts = key.split("/")
    outside = any(part in ("", ".", "..") for part in parts) or "\0" in key
    if outside or "." in base or base.startswith("__"):
        raise ValueError(
            f"key={key!r} must be a relative path without '..' whose last part has no dot and does "
            "not begin with '__': readers split a member's name at the first dot and pass over "
            "names such as __index__"
        )
    if not members:
        raise ValueError(f"key={key!r} has no members")
    for ext in members:
        if not ext or ext.startswith((".", "_")) or "/" in ext or "\0" in ext:
            raise ValueError(
                f"key={key!r}: extension {ext!r} must be a name such as 'mp4' or 'json'"
            )


def list_shards(folder: Path | str) -> list[Path]:
    """The tars of a folder, sorted by name.

    Raises:
        ValueError: the folder is missing or holds no tar.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; it must hold WebDataset tars (*.tar)")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ValueError(
            f"{folder}: holds no *.tar; make shards with `longtake pack` or `longtake world`"
        )
    return shards


def scan_shard(path: Path | str) -> list[SampleEntry]:
    """All samples of a tar in the order in which their keys first appear.

    Raises:
        ShardError: the tar is cut, damaged or empty; holds links, devices, absolute or '..' names;
            or has two members of one name.
    """
    path = Path(path)
    samples: dict[str, SampleEntry] = {}
    with open(path, "rb") as file:
        for name, span in _members(file, path):
            folder, _, base = name.rpartition("/")
            stem, dot, ext = base.partition(".")
            if not stem or not dot or base.startswith("__"):
                continue  # README, .DS_Store, __index__ and the like are no part of any sample
            key = f"{folder}/{stem}" if folder else stem
            entry = samples.setdefault(key, SampleEntry(key))
            if ext in entry.members:
                raise ShardError(f"{path}: two members are named {name!r}; keys must be unique")
            entry.members[ext] = span
    if not samples:
        raise ShardError(
            f"{path}: the tar holds no samples (key.ext members); remove it or make it again"
        )
    return list(samples.values())


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[str, Span]]:
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
        size = int(overrides.get("size", info.size))
        start = position + _BLOCK
        if size < 0 or start + size > end:
            raise ShardError(
                f"{path}: cut at byte {end} inside {info.name!r}; copy or make it again"
            )
        position = start + -(-size // _BLOCK) * _BLOCK
        if info.type in (_GNU_LONG_NAME, _PAX, _PAX_GLOBAL):
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
        if not space or not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
            raise ShardError(f"{path}: damaged pax header")
        key, equals, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if not equals or (key == b"size" and not value.isdigit()):
            raise ShardError(f"{path}: damaged pax header")
        if key == b"path":
            found["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            found["size"] = int(value)
        data = data[int(length) :]
    return found


def _safe_name(name: str, path: Path) -> str:
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


class ShardReader:
    """Reads members by offset, keeping a few shards open. One for each process; not for threads."""

    def __init__(self, max_open: int = 16) -> None:
        self._max_open = max_open
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, span: Span) -> bytes:
        """The bytes of a member.

        Raises:
            ShardError: the shard ends before the member does.
        """
        fd = self._open.get(path)
        if fd is None:
            fd = os.open(path, os.O_RDONLY)
            self._open[path] = fd
            if len(self._open) > self._max_open:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(path)
        data = os.pread(fd, span.size, span.offset)
        while len(data) < span.size:  # one pread returns at most 2 GiB
            more = os.pread(fd, span.size - len(data), span.offset + len(data))
            if not more:
                raise ShardError(
                    f"{path}: ends {span.size - len(data)} bytes short of a member; changed after "
                    "indexing: run `longtake index` again"
                )
            data += more
        return data

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_max_open": self._max_open, "_open": OrderedDict()}
