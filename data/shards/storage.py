"""Where shards lie: a local folder, or a URL that fsspec opens, read through a node-local cache."""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import xxhash

from longtake.data.config import CacheConfig
from longtake.data.shards import ShardError, Span, list_shards
from longtake.data.shards.node_cache import cache_folder
from longtake.data.shards.remote import MissingFile, RemoteFolder, StorageError
from longtake.data.shards.remote_shards import RemoteShards

__all__ = [
    "MissingFile",
    "Root",
    "Shards",
    "StorageError",
    "fetch_catalogue",
    "is_remote",
    "join",
    "list_tars",
    "local_copy",
    "parse_root",
    "read_file",
    "require_package",
]

Root = Path | str
"""A local folder as Path, a remote one as URL without a slash at its end."""

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")

_MAX_OPEN = 16
_AT_ONCE = 16  # files of a catalogue
_MANIFEST = "manifest.json"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # one letter is a drive


def is_remote(root: Root) -> bool:
    """Whether reads go through fsspec."""
    return isinstance(root, str)


def parse_root(text: str | Path) -> Root:
    """The root that a config or a command line names.

    Only stores of SCHEMES are opened: fsspec and WebDataset know schemes that run commands
    (`pipe:`) or read what a file of the store names (`reference:`, `::` chains).

    Raises:
        ValueError: another scheme, a URL with a query or a password, a store's package is missing.
    """
    if isinstance(text, Path):
        return text
    scheme = _SCHEME.match(text)
    if scheme is None and "::" not in text:
        return Path(text)
    name = scheme[1].lower() if scheme else ""
    parts = urlsplit(text)
    if name == "file" and not parts.netloc and "::" not in text:
        return Path(unquote(parts.path))
    if name not in SCHEMES or not parts.netloc or "::" in text:
        raise ValueError(
            f"{text}: only folders and {', '.join(f'{s}://' for s in SCHEMES)} are opened; "
            "commands (pipe:), archives and chains of file systems (::) are refused; write a local "
            "folder with a colon in its name as ./name"
        )
    if parts.query or parts.fragment or parts.password:
        raise ValueError(
            f"{name}://{parts.hostname}{parts.path}: a URL must have no query, fragment or "
            "password; fsspec reads credentials from the environment and from ~/.config/fsspec"
        )
    require_package(name)
    return text.rstrip("/")


def require_package(scheme: str) -> None:
    """ValueError where fsspec does not know the scheme, or its package is not installed."""
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        raise ValueError(f"{scheme}://: {error} (a package that this environment lacks)") from error


def join(root: Root, name: str) -> Root:
    """A folder or file below a root."""
    return root / name if isinstance(root, Path) else f"{root}/{name}"


def read_file(root: Root, name: str, cache: CacheConfig | None = None) -> bytes:
    """A small file, whole; remote ones are not kept.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the store cannot be reached.
    """
    if isinstance(root, Path):
        return (root / name).read_bytes()
    return RemoteFolder(root, cache or CacheConfig()).read(name)


def list_tars(root: Root, cache: CacheConfig | None = None) -> list[tuple[str, int]]:
    """The tars of a folder as (name, bytes), sorted by name.

    Raises:
        ValueError: no such folder, it cannot be listed, or it holds no tar.
        StorageError: the store cannot be reached.
    """
    if isinstance(root, Path):
        return [(path.name, path.stat().st_size) for path in list_shards(root)]
    folder = RemoteFolder(root, cache or CacheConfig())
    try:
        names = [name for name in folder.names() if name.endswith(".tar")]
    except MissingFile:
        raise ValueError(f"{root}: no such folder; it must hold WebDataset tars (*.tar)") from None
    if not names:
        raise ValueError(f"{root}: lists no *.tar; a web server must be able to list the folder")
    return [(name, _known_size(folder, name)) for name in names]


def _known_size(folder: RemoteFolder, name: str) -> int:
    size = folder.size(name)
    if size is None:
        raise StorageError(f"{folder.url}/{name}: the server does not say how long the file is")
    return size


@contextmanager
def local_copy(root: Root, name: str, cache: CacheConfig | None = None) -> Iterator[Path]:
    """The file itself, or a temporary copy of a remote one ($TMPDIR must have room for it).

    Raises:
        StorageError: the store cannot be reached or has no such file.
    """
    if isinstance(root, Path):
        yield root / name
        return
    with tempfile.TemporaryDirectory(prefix="longtake-") as folder:
        path = Path(folder) / name.rsplit("/", 1)[-1]
        RemoteFolder(root, cache or CacheConfig()).download(name, str(path))
        yield path


# What a forked child must not finalise: locks, sockets and their epoll are shared with its parent.
_inherited: list[RemoteShards] = []


class Shards:
    """Reads members of the shards of one root. One for each thread; survives pickling and forks."""

    def __init__(self, root: Root, cache: CacheConfig) -> None:
        self.root, self._cache = root, cache
        self._open: OrderedDict[str, int] = OrderedDict()
        self._remote: RemoteShards | None = None

    def read(
        self, shard: str, spans: Sequence[Span], *, shard_bytes: int | None = None
    ) -> list[bytes]:
        """The bytes of some members of one sample, in order; `shard_bytes` as of the catalogue.

        Raises:
            ShardError: the shard ends before a member does, or has another size than the catalogue
                says.
            StorageError: the store cannot be reached. No fault of the sample: the run must stop.
        """
        if isinstance(self.root, str):
            return self._live(self.root).read(shard, spans, shard_bytes)
        fd = self._open.get(shard)
        if fd is None:
            fd = self._open_shard(shard)
        else:
            self._open.move_to_end(shard)
        found = []
        # One pread for each: copying the parts out of a common one costs five times a system call.
        for span in spans:
            data = os.pread(fd, span.size, span.offset)
            found.append(data if len(data) == span.size else self._rest(fd, shard, span, data))
        return found

    def prefetch(self, wanted: Sequence[tuple[str, Sequence[Span]]]) -> None:
        """Fetch (shard, spans) of coming samples in the background, in this order, as far as the
        cache has room; what an earlier call asked for and is not begun is forgotten.

        Local shards need none: the kernel reads ahead.
        """
        if isinstance(self.root, str):
            self._live(self.root).prefetch(wanted)

    def forget(self, shard: str, spans: Sequence[Span]) -> bool:
        """Drop what the cache holds of a sample whose content is wrong; whether it did: then the
        next read fetches it again."""
        return isinstance(self.root, str) and self._live(self.root).forget(shard, spans)

    def close(self) -> None:
        """Close every file and connection; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])
        if self._remote is not None and self._remote.pid == os.getpid():
            self._remote.close()
            self._remote = None

    def _live(self, url: str) -> RemoteShards:
        if self._remote is not None and self._remote.pid != os.getpid():
            _inherited.append(self._remote)
            self._remote = None
        if self._remote is None:
            self._remote = RemoteShards(url, self._cache)
        return self._remote

    def _open_shard(self, shard: str) -> int:
        fd = self._open[shard] = os.open(join(self.root, shard), os.O_RDONLY)
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _rest(self, fd: int, shard: str, span: Span, data: bytes) -> bytes:
        while len(data) < span.size:  # one pread returns at most 2 GiB
            more = os.pread(fd, span.size - len(data), span.offset + len(data))
            if not more:
                raise ShardError(
                    f"{join(self.root, shard)}: ends {span.size - len(data)} bytes short of a "
                    "member; changed after indexing: run `longtake index` again"
                )
            data += more
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_remote": None}


def fetch_catalogue(root: Root, cache: CacheConfig) -> Path:
    """A local folder with the files of the catalogue at `root` (the folder of manifest.json).

    A remote one is copied once for each state of its manifest; of many processes one copies it and
    the others wait.

    Raises:
        FileNotFoundError: no manifest.json there.
        StorageError: the store cannot be reached.
        ValueError: a damaged manifest, or one that changes while it is copied.
    """
    if isinstance(root, Path):
        return root
    remote = RemoteFolder(root, cache)
    home = cache_folder(cache) / "catalogues" / xxhash.xxh3_128_hexdigest(root.encode())
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = remote.read(_MANIFEST)
        folder = home / xxhash.xxh3_128_hexdigest(manifest)
        if not folder.is_dir():
            _copy_catalogue(remote, manifest, folder)
    return folder


def _copy_catalogue(remote: RemoteFolder, manifest: bytes, folder: Path) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp")  # one at a time: the lock is held
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    names = _parts(remote.url, manifest)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for name, data in zip(names, threads.map(remote.read, names), strict=True):
            (temporary / name).write_bytes(data)
    if remote.read(_MANIFEST) != manifest:
        raise ValueError(f"{remote.url}/{_MANIFEST}: changed while it was copied; try again")
    (temporary / _MANIFEST).write_bytes(manifest)
    os.replace(temporary, folder)


def _parts(url: str, manifest: bytes) -> list[str]:
    try:
        names = [f"{name}.parquet" for name in json.loads(manifest)["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{url}/{_MANIFEST}: damaged: {error}") from None
    for name in names:
        if "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{url}/{_MANIFEST}: {name!r} is no file name")
    return names
