"""Checkpoints written while training goes on: training waits for a copy to CPU memory, no more."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from longtake.train.checkpoint import Keep, prune, write
from longtake.train.checkpoint_copy import CheckpointCopies
from longtake.train.ema import Ema
from longtake.train.engine import Engine, Ranks
from longtake.train.snapshot import Snapshot, take_snapshot
from longtake.train.tasks import Opponent

LEAVE_SECONDS = 60.0  # that a failed run gives the checkpoint under way, and its copy


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread, whose agreements have a group of their own.

    All ranks build it together, and call `start` and `finish` alike.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, keep: Keep, copies: CheckpointCopies | None = None
    ) -> None:
        self.folder, self.keep, self.copies = folder, keep, copies
        self._ranks = ranks.beside()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint writer")
        self._job: Future[None] | None = None
        self._snapshot: Snapshot | None = None

    def start(
        self,
        step: int,
        engine: Engine,
        ema: Ema,
        adversary: Opponent | None,
        train_state: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        """Copy the state and begin to write it as the checkpoint of `step`.

        Waits for the one before. Errors: CheckpointError of that one, on all ranks.
        """
        self.finish()
        self._snapshot = take_snapshot(
            engine, ema, adversary, train_state, config, memory_of=self._snapshot
        )
        self._job = self._thread.submit(self._write, step, self._snapshot)

    def _write(self, step: int, snapshot: Snapshot) -> None:
        write(self.folder, step, snapshot, self._ranks)
        if self.copies is not None:
            self.copies.start(step)
        in_hand = self.copies.in_hand if self.copies is not None else None
        prune(self.folder, step, self.keep, self._ranks, spare=in_hand)

    def problem(self) -> str:
        """Why the last checkpoint was not written; empty while all is well, or not known yet."""
        error = self._job.exception() if self._job is not None and self._job.done() else None
        return str(error) if error is not None else ""

    def finish(self) -> None:
        """Wait until the checkpoint under way is there. Errors: CheckpointError on all ranks."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self, *, failed: bool = False) -> None:
        """End the thread; what is under way gets some time, though other ranks may be gone.

        A run that has not `failed` waits until its last checkpoint is copied.
        """
        if self._job is not None:
            wait([self._job], LEAVE_SECONDS)
        self._thread.shutdown(wait=False)
        if self.copies is not None:
            self.copies.close(LEAVE_SECONDS if failed else None)
