"""Who encodes which shard, agreed through files alone: by any number of processes, on any machines
that share the folder, started together or one after the other.

A shard belongs to the process that locks its byte of OUT.lock. The kernel frees the locks of a
process that dies, however it dies, and another one takes the shard over; there is no collective.
Record locks (fcntl) also work on network file systems, and a decoder's child does not inherit them.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from longtake.train.run_folder import write_json

JOB = "job.json"
_DOOR, _SHARDS = 0, 1  # bytes of the lock file: one for the start, then one for each shard
_LOOK_AGAIN = 0.2  # seconds, once all that is left is in other hands


@dataclass(frozen=True)
class ShardRecord:
    """What became of one source shard; kept once its tar is whole, so it says that it is done."""

    samples: int
    bytes: int
    skipped: list[dict[str, str]]


class Claims:
    """OUT.partial, where shards gather until OUT appears, and this process's claims on them."""

    def __init__(self, out: Path) -> None:
        self.out, self.staging = out, out.with_name(f"{out.name}.partial")
        self._lock = out.with_name(f"{out.name}.lock")
        self._records: dict[str, ShardRecord] = {}

    def __enter__(self) -> Self:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._lock, "a+b")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process is at its start."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _DOOR)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _DOOR)

    def open_staging(self, job: dict[str, Any]) -> None:
        """Make OUT.partial, or go on with that of a stopped run; ValueError if of another job."""
        self.staging.mkdir(exist_ok=True)
        record = self.staging / JOB
        if record.is_file():
            started = json.loads(record.read_text(encoding="utf-8"))
            other = [key for key in job if started.get(key) != job[key]]
            if other:
                raise ValueError(
                    f"{self.staging}: holds a half-done encode of other {', '.join(other)}; remove "
                    "it, or choose another folder"
                )
        write_json(record, job)

    def deal(self, shards: Sequence[str]) -> Iterator[str]:
        """Shards that nobody has done, each claimed while the caller works on it.

        Ends when all are done, by whomever: what a process that dies had claimed is dealt again.
        """
        left = dict(enumerate(shards))
        while left:
            busy = True
            for index, name in list(left.items()):
                if not self._claim(index):
                    continue
                try:
                    if not self._is_done(name):
                        yield name
                    del left[index]
                    busy = False
                finally:
                    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _SHARDS + index)
            if busy and left:
                time.sleep(_LOOK_AGAIN)

    @contextmanager
    def everything(self) -> Iterator[None]:
        """No other process holds a shard."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 0, _SHARDS)
        yield
        self._lock.unlink(missing_ok=True)  # who still waits for it will find OUT

    def record(self, name: str, record: ShardRecord) -> None:
        """Say that a shard is done."""
        write_json(self._place(name), asdict(record))

    def records(self, shards: Sequence[str]) -> dict[str, ShardRecord]:
        """What is known of the shards that are done, in their order."""
        for name in shards:
            if name not in self._records and self._place(name).is_file():
                fields = json.loads(self._place(name).read_text(encoding="utf-8"))
                self._records[name] = ShardRecord(**fields)
        return {name: self._records[name] for name in shards if name in self._records}

    def forget_records(self, shards: Sequence[str]) -> None:
        """Remove what only mattered until all were done."""
        for name in shards:
            self._place(name).unlink()

    def _claim(self, index: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _SHARDS + index)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _is_done(self, name: str) -> bool:
        # In this order: OUT appears in one step, with records that go just before.
        return self._place(name).is_file() or self.out.is_dir()

    def _place(self, name: str) -> Path:
        return self.staging / f"{name}.done"
