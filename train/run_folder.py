"""The run folder: one marker file that says how the run stands, and where its parts lie."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtake.train.ranks import Ranks

RUNNING, PREEMPTED, FAILED, FINISHED = "RUNNING", "PREEMPTED", "FAILED", "FINISHED"
MARKERS = (RUNNING, PREEMPTED, FAILED, FINISHED)
CONFIG, METRICS, QUARANTINE = "config.yaml", "metrics.jsonl", "quarantine.jsonl"
RANK_TIMES = "ranks.jsonl"
CHECKPOINTS, SAMPLES, VALIDATION = "checkpoints", "samples", "validation"
LOCK = "lock"
LAUNCHED = "LONGTAKE_LAUNCHED"  # environment: when `longtake train` started torchrun, unix time


def mark(folder: Path, marker: str, **details: str | int) -> None:
    """Leave `marker` as the folder's only one; it holds the time and `details` as JSON.

    The new one is there before the old ones go: launchers never find none. Any rank may call it.
    """
    assert marker in MARKERS
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{marker}.tmp-{os.getpid()}"
    try:
        scratch.write_text(json.dumps({"time": time.time(), **details}) + "\n", encoding="utf-8")
    except OSError:
        # No room for a file: the old marker under the new name still says how the run stands.
        scratch.unlink(missing_ok=True)
        old = read_marker(folder)
        if old is None:
            raise
        scratch = folder / old
    os.replace(scratch, folder / marker)
    for other in MARKERS:
        if other != marker:
            (folder / other).unlink(missing_ok=True)


def check_replaceable(folder: Path, proof: str) -> None:
    """ValueError unless `folder` is free, empty, or an older result, which holds `proof`."""
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not (folder / proof).is_file():
        raise ValueError(f"{folder}: exists and holds no {proof} to replace; name another folder")


def write_json(path: Path, tree: Mapping[str, Any], *, allow_nan: bool = True) -> None:
    """Write a JSON file that is never seen half written, whoever else writes it.

    ValueError for a value that is not finite, unless allowed.
    """
    scratch = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    text = json.dumps(tree, indent=1, allow_nan=allow_nan) + "\n"
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


@contextmanager
def written_whole(folder: Path, ranks: Ranks | None = None) -> Iterator[Path]:
    """A scratch folder to write into, the same one on all `ranks`.

    It takes the place of `folder` when the block ends, and an older one goes only then; it is gone
    when the block fails.
    """
    pid = os.getpid() if ranks is None else ranks.broadcast(os.getpid())
    scratch = folder.with_name(f"{folder.name}.tmp-{pid}")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
        if ranks is None or ranks.is_main:
            _replace(scratch, folder)
        if ranks is not None:
            ranks.barrier()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(scratch: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(scratch, folder)
    shutil.rmtree(old, ignore_errors=True)


class FolderInUse(ValueError):
    """Another training holds the run folder; its marker is not ours to change."""


class FolderLock:
    """One training at a time in a folder: two would write each other's metrics and checkpoints.

    The lock dies with its process, however that ends. A restart may come while the killed run's
    last process is still going, so it is waited for.
    """

    def __init__(self, folder: Path, wait: float = 60.0) -> None:
        """FolderInUse when another process holds the folder for longer than `wait` seconds."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / LOCK).open("a+", encoding="utf-8")
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    holder = self._file.read().strip() or "unknown"
                    self._file.close()
                    raise FolderInUse(
                        f"{folder} is in use by another training (process {holder}); "
                        "stop it or give another output_dir"
                    ) from None
                time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def release(self) -> None:
        """Let another training have the folder."""
        self._file.close()


def read_marker(folder: Path) -> str | None:
    """The marker of a run folder, None where no run has started."""
    found = [marker for marker in MARKERS if (folder / marker).exists()]
    return found[0] if found else None
