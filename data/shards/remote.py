"""A folder on a store that fsspec opens: read by files and byte ranges, written by whole files; all
is tried again with pauses."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from longtake.data.config import CacheConfig
from longtake.data.randomness import uniform

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds

_PIECE = 2**23
_HTTP = ("http://", "https://")
# 4xx answers that another try may change: request timeout, too early, too many requests.
_PASSING = (408, 425, 429)
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError, TypeError, ValueError)

T = TypeVar("T")


class StorageError(OSError):
    """A store that cannot be reached or answers wrongly. It says nothing about the samples."""


class MissingFile(StorageError, FileNotFoundError):
    """The store answers that there is no such file."""


class RemoteFolder:
    """The folder `url`. Threads may share it, processes may not: connections do not survive forks.

    Raises (all methods):
        StorageError: after the last try, or at once where another one cannot help (403, a server
            that ignores byte ranges); MissingFile for 404.
    """

    def __init__(self, url: str, cache: CacheConfig) -> None:
        from fsspec.core import url_to_fs  # aiohttp and the like: 0.3 s that local roots never need

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if url.startswith(_HTTP):
            # Offsets count bytes of the file, not of a compressed transfer.
            options["headers"] = {**_configured_headers(url), "Accept-Encoding": "identity"}
        elif url.startswith("file:"):
            options["auto_mkdir"] = True  # as on the other stores, where folders are mere names
        self.url = url
        self._cache = cache
        self._fs, self._path = url_to_fs(url, **options)
        self._limits = {"timeout": cache.timeout} if self._fs.async_impl else {}
        self.ranges_work = False  # seen in this process

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where the server does not say."""
        info = self._patiently(name, lambda: self._fs.info(self._full(name), **self._limits))
        return info.get("size")

    def read(self, name: str) -> bytes:
        """A whole small file."""
        return self._patiently(name, lambda: self._fs.cat_file(self._full(name), **self._limits))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes start..stop of a file."""

        def once() -> bytes:
            data = self._fs.cat_file(self._full(name), start=start, end=stop, **self._limits)
            return self._checked(data, name, start, stop)

        return self._patiently(name, once)

    def try_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """Many (name, start, stop) at once, in one try; None for those that failed."""
        if not ranges:
            return []
        names, starts, stops = zip(*ranges, strict=True)
        paths = [self._full(name) for name in names]
        found = self._fs.cat_ranges(
            paths, list(starts), list(stops), on_error="return", **self._limits
        )
        whole = [
            data if isinstance(data, bytes) and len(data) == stop - start else None
            for data, (_, start, stop) in zip(found, ranges, strict=True)
        ]
        self.ranges_work = self.ranges_work or any(whole)
        return whole

    def names(self) -> list[str]:
        """What the folder lists, sorted, without the folders in it."""
        return self._listed("file")

    def folders(self) -> list[str]:
        """The folders that the folder lists, sorted."""
        return self._listed("directory")

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self.size(name)
        except MissingFile:
            return False
        return True

    def download(self, name: str, path: str) -> None:
        """Copy a file of any size to a local path, piece by piece."""
        size = self.size(name)
        if size is None:
            raise StorageError(f"{self.url}/{name}: the server does not say how long the file is")
        with open(path, "wb") as file:
            for start in range(0, size, _PIECE):
                file.write(self.read_range(name, start, min(start + _PIECE, size)))

    def upload(self, path: str, name: str) -> None:
        """Copy a local file of any size here; StorageError also where it did not arrive whole."""
        self._write(name, lambda: self._fs.put_file(path, self._full(name)))
        sent, arrived = os.path.getsize(path), self.size(name)
        if arrived != sent:
            raise StorageError(f"{self.url}/{name}: {arrived} of {sent} bytes arrived")

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._write(name, lambda: self._fs.pipe_file(self._full(name), data))

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all that is in it; one that is not there is no error."""
        with suppress(MissingFile):
            self._patiently(name, lambda: self._fs.rm(self._full(name), recursive=True))

    def _write(self, name: str, work: Callable[[], object]) -> None:
        try:
            self._patiently(name, work)
        except MissingFile as error:  # not the file, which is new, but what it should lie in
            raise StorageError(f"{self.url}/{name}: {error.__cause__}") from error

    def _listed(self, kind: str) -> list[str]:
        entries = self._patiently("", lambda: self._fs.ls(self._path, detail=True, **self._limits))
        found = [entry["name"].rstrip("/") for entry in entries if entry["type"] == kind]
        names = {name.rsplit("/", 1)[-1] for name in found}
        return sorted(map(unquote, names) if self.url.startswith(_HTTP) else names)

    def _full(self, name: str) -> str:
        return (
            f"{self._path}/{quote(name)}" if self.url.startswith(_HTTP) else f"{self._path}/{name}"
        )

    def _checked(self, data: bytes, name: str, start: int, stop: int) -> bytes:
        if len(data) > stop - start:
            raise StorageError(
                f"{self.url}/{name}: the server ignores byte ranges: it sent {len(data)} bytes for "
                f"{start}-{stop - 1}; serve the shards from a server with Range support, or copy "
                "them to a local folder"
            )
        if len(data) < stop - start:
            raise EOFError(f"{len(data)} of {stop - start} bytes came")
        self.ranges_work = self.ranges_work or bool(data)
        return data

    def _patiently(self, name: str, work: Callable[[], T]) -> T:
        where = f"{self.url}/{name}" if name else self.url
        problem: BaseException | None = None
        for number in range(self._cache.retries + 1):
            if number:
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (number - 1))
                time.sleep(pause * (0.5 + uniform(number, where) / 2))
            try:
                return work()
            except StorageError:
                raise
            except Exception as error:  # stores raise their own kinds; none may pass unexplained
                problem = _cause(error)
            if isinstance(problem, FileNotFoundError) or _status(problem) in (404, 410):
                raise MissingFile(f"{where}: the store has no such file") from problem
            if not _may_pass(problem):
                raise StorageError(f"{where}: {_reason(problem)}") from problem
        assert problem is not None
        raise StorageError(
            f"{where}: {_reason(problem)}, after {self._cache.retries + 1} tries; is the store "
            "reachable? See data.cache.retries and data.cache.timeout"
        ) from problem


def _configured_headers(url: str) -> dict[str, str]:
    from fsspec.config import conf

    return conf.get(url.partition(":")[0], {}).get("headers", {})


def _cause(error: Exception) -> BaseException:
    """fsspec's HTTP `info` turns every failure into FileNotFoundError and keeps the real one."""
    return error.__cause__ or error if isinstance(error, FileNotFoundError) else error


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in _PASSING
    return not isinstance(error, _FINAL)


def _reason(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {error}"
