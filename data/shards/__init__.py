"""Plain WebDataset tars: write, scan, read by offset.

The scan is strict and its own (see tars.py). Members are bytes; nothing here decodes, unpickles or
executes them.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from longtake.data.shards.tars import ShardError, Span, tar_members

__all__ = [
    "SampleEntry",
    "ShardError",
    "ShardReader",
    "ShardScan",
    "ShardWriter",
    "Span",
    "list_shards",
    "scan_members",
    "scan_shard",
]

# WebDataset opens `pipe:` URLs and unpickles members by default; its safe mode is read at import.
os.environ["WDS_SECURE"] = "1"


@dataclass
class SampleEntry:
    """One sample of a shard: extension without its first dot -> span."""

    key: str
    members: dict[str, Span] = field(default_factory=dict)


@dataclass
class ShardScan:
    """Samples in the order in which their keys first appear, and how many members of which kind
    (their extension, or what is odd about their name) belong to no sample."""

    samples: list[SampleEntry]
    passed_over: Counter[str]


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
    return scan_members(path).samples


def scan_members(path: Path | str) -> ShardScan:
    """As `scan_shard`, with the members that belong to no sample."""
    path = Path(path)
    samples: dict[str, SampleEntry] = {}
    passed_over: Counter[str] = Counter()
    with open(path, "rb") as file:
        for name, span in tar_members(file, path):
            folder, _, base = name.rpartition("/")
            stem, dot, ext = base.partition(".")
            if base.startswith("__"):  # WebDataset's own, such as __index__
                passed_over["__name"] += 1
            elif not stem:  # .DS_Store
                passed_over["hidden"] += 1
            elif not dot:  # README
                passed_over["no extension"] += 1
            else:
                key = f"{folder}/{stem}" if folder else stem
                entry = samples.setdefault(key, SampleEntry(key))
                if ext in entry.members:
                    raise ShardError(f"{path}: two members are named {name!r}; keys must be unique")
                entry.members[ext] = span
    if not samples:
        raise ShardError(
            f"{path}: the tar holds no samples (key.ext members); remove it or make it again"
        )
    return ShardScan(list(samples.values()), passed_over)


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
        end = span.offset + span.size
        if not 0 <= span.offset <= end <= os.fstat(fd).st_size:  # before memory is claimed for it
            raise ShardError(
                f"{path}: ends before byte {end}, where a member should; changed after indexing: "
                "run `longtake index` again"
            )
        data = os.pread(fd, span.size, span.offset)
        while len(data) < span.size:  # one pread returns at most 2 GiB
            more = os.pread(fd, span.size - len(data), span.offset + len(data))
            if not more:
                raise ShardError(f"{path}: became shorter while it was read")
            data += more
        return data

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_max_open": self._max_open, "_open": OrderedDict()}
