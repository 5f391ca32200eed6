"""Byte ranges of remote files kept on this node, shared by all of its processes.

One file for each range, under its final name only when whole. What is being fetched is a `.tmp`
file locked by its process: nobody fetches it twice, and a lock dies with its owner, so a kill -9
leaves nothing behind that the next process would wait for or not clean up.
"""

import fcntl
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from longtake.data.config import CacheConfig

_TEMPORARY = ".tmp"
_KEPT = 0.9  # of the limit once room had to be made, so that not every file scans the folder
_LOOK_AGAIN = 0.01  # seconds


def cache_folder(cache: CacheConfig) -> Path:
    """Where this node keeps what it need not fetch or compute again."""
    if cache.folder is not None:
        return Path(cache.folder).expanduser()
    if folder := os.environ.get("LONGTAKE_CACHE"):
        return Path(folder).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "longtake"


@dataclass(frozen=True)
class Claim:
    """The right to fetch a range, held until `NodeCache.keep` or `release`."""

    path: str
    fd: int


class NodeCache:
    """At most `max_bytes` in `folder`; what was read longest ago goes first.

    The lock file holds the sum of all sizes, never less than what lies on the disk: it grows before
    a file does and shrinks after one is gone. A folder that cannot be written is given up with one
    warning; everything is then fetched when it is read.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = str(folder), max_bytes
        self._told_too_large = False
        self.is_off = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            users = os.open(f"{self._folder}/.users", os.O_RDWR | os.O_CREAT)
            self._finalize = weakref.finalize(self, os.close, users)
            self._enter(users)
        except OSError as error:
            self._give_up(error)

    def get(self, name: str, size: int) -> bytes | None:
        """The kept bytes, or None."""
        if self.is_off:
            return None
        try:
            with open(self._path(name), "rb", buffering=0) as file:
                data = file.readall()
                os.utime(file.fileno())  # the order in which files go
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._give_up(error)
        if len(data) != size:  # a power cut leaves files without content
            self.drop(name)
            return None
        return data

    def has(self, name: str) -> bool:
        """Whether the range is kept."""
        return os.path.exists(self._path(name))

    def fetch(self, name: str, size: int, load: Callable[[], bytes], patience: float) -> bytes:
        """The kept bytes, or else those of `load()`, which are then kept.

        Another process that is fetching them is waited for, `patience` seconds at most.
        """
        deadline, claim = time.monotonic() + patience, None
        while time.monotonic() < deadline:
            data = self.get(name, size)
            if data is not None:
                return data
            try:
                claim = self.claim(name, size)
                break
            except BlockingIOError:
                time.sleep(_LOOK_AGAIN)
        try:
            data = load()
        except BaseException:
            self.release(claim)
            raise
        self.keep(claim, data)
        return data

    def claim(self, name: str, size: int) -> Claim | None:
        """Make room for a range and reserve its name; None where it will not be kept.

        Raises:
            BlockingIOError: it is kept already, or another process or thread is fetching it.
        """
        if self.is_off or not self._fits(size):
            return None
        path = self._path(name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with self._locked() as lock:
                if os.path.exists(path):
                    raise BlockingIOError(f"{path} is there")
                fd = os.open(path + _TEMPORARY, os.O_RDWR | os.O_CREAT)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._reserve(lock, size)
                    os.ftruncate(fd, size)  # so that whoever counts meanwhile sees it
                except BaseException:
                    os.close(fd)
                    raise
            return Claim(path, fd)
        except BlockingIOError:
            raise
        except OSError as error:
            return self._give_up(error)

    def keep(self, claim: Claim | None, data: bytes) -> None:
        """Store the bytes of a claimed range."""
        if claim is None:
            return
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(claim.fd, view) :]
            with self._locked():  # whoever counts must not see it come or go
                os.replace(claim.path + _TEMPORARY, claim.path)
            os.close(claim.fd)
        except OSError as error:
            self.release(claim)
            self._give_up(error)

    def release(self, claim: Claim | None) -> None:
        """Give up a claim without its bytes."""
        if claim is None:
            return
        try:
            with self._locked() as lock:
                size = os.fstat(claim.fd).st_size
                os.unlink(claim.path + _TEMPORARY)
                self._set_total(lock, self._total(lock) - size)
        except OSError as error:
            self._give_up(error)
        os.close(claim.fd)

    def drop(self, name: str) -> bool:
        """Forget a kept range; False where it was not kept."""
        if self.is_off or not self.has(name):
            return False
        try:
            with self._locked() as lock:
                size = os.stat(self._path(name)).st_size
                os.unlink(self._path(name))
                self._set_total(lock, self._total(lock) - size)
        except FileNotFoundError:
            return False  # another process was faster
        except OSError as error:
            self._give_up(error)
        return True

    def close(self) -> None:
        """Let the next process count anew."""
        if hasattr(self, "_finalize"):
            self._finalize()

    def _enter(self, users: int) -> None:
        """Every process holds a shared lock; whoever finds none counts what the last ones left."""
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(users, fcntl.LOCK_SH)
            return
        with self._locked() as lock:
            self._shrink(lock, self._max_bytes)
        fcntl.flock(users, fcntl.LOCK_SH)

    def _reserve(self, lock: int, size: int) -> None:
        if self._total(lock) + size > self._max_bytes:
            self._shrink(lock, max(0, int(_KEPT * self._max_bytes) - size))
        self._set_total(lock, self._total(lock) + size)

    def _shrink(self, lock: int, limit: int) -> None:
        """Count what is there, remove stale files, then old ones until `limit` bytes are left."""
        total, kept = 0, []
        for entry in self._files():
            if entry.name.endswith(_TEMPORARY) and _is_stale(entry.path):
                os.unlink(entry.path)
                continue
            status = entry.stat()
            total += status.st_size
            if not entry.name.endswith(_TEMPORARY):
                kept.append((status.st_mtime_ns, status.st_size, entry.path))
        for _, size, path in sorted(kept):
            if total <= limit:
                break
            os.unlink(path)  # whoever has it open reads on
            total -= size
        self._set_total(lock, total)

    def _files(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self._folder):
            if folder.is_dir():
                yield from os.scandir(folder.path)

    def _fits(self, size: int) -> bool:
        if size > self._max_bytes and not self._told_too_large:
            self._told_too_large = True
            warnings.warn(
                f"data.cache.max_bytes={self._max_bytes} is less than one sample of {size} bytes; "
                "such samples are fetched each time they are read",
                RuntimeWarning,
                stacklevel=2,
            )
        return size <= self._max_bytes

    def _give_up(self, error: OSError) -> None:
        if not self.is_off:
            warnings.warn(
                f"data.cache.folder: {self._folder}: {error}; this process goes on without the "
                "cache and fetches every sample when it is read",
                RuntimeWarning,
                stacklevel=3,
            )
        self.is_off = True

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name[:2]}/{name}"

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The lock file, opened anew: threads and forked children must not share one lock."""
        fd = os.open(f"{self._folder}/.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough where a fork has copied it
            os.close(fd)

    @staticmethod
    def _total(lock: int) -> int:
        return int.from_bytes(os.pread(lock, 8, 0), "little")

    @staticmethod
    def _set_total(lock: int, total: int) -> None:
        os.pwrite(lock, max(0, total).to_bytes(8, "little"), 0)


def _is_stale(path: str) -> bool:
    """Whether the process that was fetching into a temporary file is gone."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)
