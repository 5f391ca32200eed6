"""Checkpoints written while training goes on: training waits for a copy to CPU memory, no more."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.train.checkpoint import prune, write
from longtake.train.ema import Ema
from longtake.train.engine import Engine, Ranks
from longtake.train.snapshot import Snapshot, take_snapshot
from longtake.train.tasks import Opponent

LEAVE_SECONDS = 60.0  # that a failed run gives the checkpoint under way


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the last so many, and those whose step divides by `every`."""

    last: int  # 0 keeps all
    every: int  # 0 keeps none for its step


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread, whose agreements have a group of their own.

    All ranks build it together, and call `start` and `finish` alike.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: Keep) -> None:
        self.folder, self.keep = folder, keep
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
        prune(self.folder, step, self.keep.last, self.keep.every, self._ranks)

    def problem(self) -> str:
        """Why the last checkpoint was not written; empty while all is well, or not known yet."""
        error = self._job.exception() if self._job is not None and self._job.done() else None
        return str(error) if error is not None else ""

    def finish(self) -> None:
        """Wait until the checkpoint under way is there. Errors: CheckpointError on all ranks."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """End the thread; what is under way gets some time, though other ranks may be gone."""
        if self._job is not None:
            wait([self._job], LEAVE_SECONDS)
        self._thread.shutdown(wait=False)
