"""Copies of checkpoints on a store that fsspec opens: they outlive the machine that trains.

A copy is the folder `step-%08d` there with the files of the local one. It exists when its manifest
does, which is the last file to come and the first to go.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from longtake.data.config import CacheConfig
from longtake.data.shards.remote import MissingFile, RemoteFolder
from longtake.data.shards.storage import require_package
from longtake.train.checkpoint import (
    MANIFEST,
    REPLACED,
    UNFINISHED,
    CheckpointError,
    Keep,
    agree,
    list_steps,
    put_in_place,
    read_manifest,
    step_name,
    verify,
)
from longtake.train.checks import require
from longtake.train.range_files import sha256_of
from longtake.train.ranks import Ranks

LONGEST_COPY = timedelta(days=2)  # that a rank waits for the files of another one
logger = logging.getLogger("longtake.checkpoint")


def copy_url(target: str, run_folder: Path) -> str:
    """train.checkpoint_copy, a folder or the URL of one, as a URL; ValueError for no such."""
    key = f"train.checkpoint_copy={target}"
    require("::" not in target, f"{key}: chains of file systems (::) are refused; name one store")
    if "://" not in target:
        target = f"file://{Path(target).absolute()}"
    parts = urlsplit(target)
    require(
        not (parts.password or parts.query or parts.fragment),
        "train.checkpoint_copy must have no password, query or fragment: fsspec reads credentials "
        "from the environment and from ~/.config/fsspec",
    )
    require(parts.scheme not in ("http", "https"), f"{key} cannot be written: use s3://, gs:// …")
    local = parts.scheme == "file" and Path(parts.path).is_relative_to(run_folder)
    require(not local, f"{key} lies in output_dir={run_folder}: name a folder elsewhere")
    try:
        require_package(parts.scheme)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return target.rstrip("/")


class CheckpointCopies:
    """Copies the checkpoints of `folder` to `url`, in a thread with a group of its own.

    All ranks build it together and call it alike. What goes wrong with the store never ends the
    run: it is said, counted in `failures`, and the next checkpoint tries again.
    """

    def __init__(
        self, folder: Path, url: str, ranks: Ranks, keep: Keep, cache: CacheConfig
    ) -> None:
        self.url, self.failures = url, 0
        self.in_hand: int | None = None  # step whose files are being copied, on rank 0
        self._folder, self._keep, self._cache = folder, keep, cache
        self._ranks = ranks.beside(LONGEST_COPY)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint copies")
        self._job: Future[None] | None = None
        self._newest = -1
        self._copied: dict[str, str] = {}  # copy -> sha256 of its manifest's bytes, on rank 0

    @cached_property
    def _store(self) -> RemoteFolder:
        return RemoteFolder(self.url, self._cache)  # late: some clients connect at once

    # To the store

    def start(self, step: int) -> None:
        """Begin to copy the local checkpoint of `step`.

        Calls that come while a copy is under way queue up; only the newest of them has work to do.
        """
        self._newest = step
        self._job = self._thread.submit(self._copy)

    def close(self, seconds: float | None) -> None:
        """End the thread; what is under way gets `seconds` (None: as long as it takes)."""
        if self._job is not None:
            wait([self._job], seconds)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _copy(self) -> None:
        try:
            for name in agree(self._ranks, self._lacking)[0]:
                self._put(name)
        except CheckpointError as error:
            self.failures += 1
            if self._ranks.is_main:
                text = "checkpoint %d was not copied to %s: %s; the next one tries again"
                logger.warning(text, self._newest, self.url, error)
        self.in_hand = None

    def _lacking(self) -> list[str]:
        """What is to be copied: the newest checkpoint, and those kept for ever, if not there."""
        if not self._ranks.is_main:
            return []
        self.in_hand = self._newest
        older = [path.name for step, path in list_steps(self._folder) if self._stays(step, path)]
        names = dict.fromkeys([step_name(self._newest), *older])
        return [name for name in names if not self._is_copied(name)]

    def _stays(self, step: int, path: Path) -> bool:
        return self._keep.has_for_ever(step) and not path.name.startswith(REPLACED)

    def _is_copied(self, name: str) -> bool:
        """Whether the store holds this very checkpoint, not one of another attempt."""
        mine, manifest = sha256_of(self._folder / name / MANIFEST), f"{name}/{MANIFEST}"
        if self._copied.get(name) != mine and self._store.exists(manifest):
            self._copied[name] = hashlib.sha256(self._store.read(manifest)).hexdigest()
        return self._copied.get(name) == mine

    def _put(self, name: str) -> None:
        local, manifest = self._folder / name, f"{name}/{MANIFEST}"
        sealed = b""

        def begin() -> list[str]:
            nonlocal sealed
            if not self._ranks.is_main:
                return []
            sealed = (local / MANIFEST).read_bytes()
            self._store.delete(manifest)
            return sorted(read_manifest(local)["files"])

        def put_own() -> None:
            for file in self._own(files):
                self._store.upload(str(local / file), f"{name}/{file}")

        def commit() -> None:
            if not self._ranks.is_main:
                return
            if (local / MANIFEST).read_bytes() != sealed:
                raise CheckpointError(f"{local} was replaced meanwhile")
            self._store.write(manifest, sealed)
            self._copied[name] = hashlib.sha256(sealed).hexdigest()
            self._prune()

        files = agree(self._ranks, begin)[0]
        agree(self._ranks, put_own)
        agree(self._ranks, commit)

    def _own(self, files: list[str]) -> list[str]:
        """This rank's part; of as many ranks' files as there are ranks each gets what it wrote."""
        ordered = sorted(files, key=lambda name: (not name.startswith("rank-"), name))
        return ordered[self._ranks.rank :: self._ranks.world_size]

    def _prune(self) -> None:
        """Delete copies that need not be kept, now that the newest is there, and unfinished ones
        before it."""
        older = [step for step in self._steps() if step < self._newest]
        for step in sorted({*older} - self._keep.stay(self._whole(older))):
            self._store.delete(f"{step_name(step)}/{MANIFEST}")
            self._store.delete(step_name(step))

    # From the store

    def whole_steps(self) -> list[int]:
        """Steps of the copies, newest first, on all ranks; CheckpointError on all of them where
        the store cannot be read."""

        def listed() -> list[int]:
            return self._whole(self._steps()) if self._ranks.is_main else []

        return agree(self._ranks, listed)[0]

    def _whole(self, steps: Sequence[int]) -> list[int]:
        return [step for step in steps if self._store.exists(f"{step_name(step)}/{MANIFEST}")]

    def _steps(self) -> list[int]:
        names: list[str] = []
        with suppress(MissingFile):  # nothing was copied yet
            names = self._store.folders()
        numbers = [int(n) for n in (name.removeprefix("step-") for name in names) if n.isdigit()]
        return sorted((n for n in numbers if step_name(n) in names), reverse=True)

    def fetch_newer(self, last: Path | None) -> Path | None:
        """The newest good copy, now a local checkpoint, where it is newer than `last`; else that.

        Damaged ones are passed over with a warning. Errors: CheckpointError on all ranks where the
        store cannot be read and nothing is here: a run that began anew would replace the copies.
        """
        here = -1 if last is None else int(read_manifest(last)["step"])
        try:
            for step in self.whole_steps():
                if step > here and (path := self._fetch(step_name(step))) is not None:
                    return path
        except CheckpointError as error:
            if last is None:
                raise CheckpointError(
                    f"train.checkpoint_copy={self.url} cannot be read and there is no checkpoint "
                    f"here: {error}. Start again when it can, or begin anew with "
                    "train.checkpoint_copy=null"
                ) from error
            if self._ranks.is_main:
                logger.warning("%s: %s; the run goes on from %s", self.url, error, last)
        return last

    def _fetch(self, name: str) -> Path | None:
        """A copy as a local checkpoint, None where it is damaged; all ranks together."""
        scratch = self._folder / f"{UNFINISHED}{name}"

        def fetch_manifest() -> list[str]:
            if not self._ranks.is_main:
                return []
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            (scratch / MANIFEST).write_bytes(self._store.read(f"{name}/{MANIFEST}"))
            with suppress(CheckpointError):  # told by verify below
                return sorted(read_manifest(scratch)["files"])
            return []

        def fetch_own() -> None:
            for file in self._own(files):
                with suppress(MissingFile):  # told by verify below
                    self._store.download(f"{name}/{file}", str(scratch / file))

        def commit() -> None:
            if self._ranks.is_main:
                put_in_place(scratch, self._folder / name)

        files = agree(self._ranks, fetch_manifest)[0]
        agree(self._ranks, fetch_own)
        problems = verify(scratch, self._ranks)
        if not problems:
            agree(self._ranks, commit)
            return self._folder / name
        if self._ranks.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
            text = "; ".join(problems)
            logger.warning("checkpoint %s/%s is passed over: %s", self.url, name, text)
        return None
