"""Processes that work through untrusted files: one that hangs or dies costs its file, no more."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from longtake.data.processes import die_with_parent, limit_memory

_HEARTBEAT = 1.0  # seconds between signs of life, at least
_FORK = multiprocessing.get_context("fork")

Work = Callable[[Any, Callable[[], None]], Any]


class WorkerPool:
    """Runs `work(task, alive)` in forked processes that die with this one.

    A task that calls `alive` less often than every `timeout` seconds is killed. Results and tasks
    go through pipes: keep them small. Exceptions of a task are its outcome, except for OSError,
    which stops everything: it speaks of this machine (a full disk), not of the file.
    """

    def __init__(self, work: Work, num_workers: int, timeout: float, max_memory: int) -> None:
        """`timeout` in seconds, `max_memory` in bytes for each process."""
        self._work, self._timeout, self._max_memory = work, timeout, max_memory
        self._idle: list[tuple[BaseProcess, Connection]] = []
        self._busy: dict[Connection, tuple[BaseProcess, int, float]] = {}
        self._num_workers = num_workers

    @property
    def has_idle(self) -> bool:
        """Whether `submit` may be called."""
        return len(self._busy) < self._num_workers

    @property
    def num_busy(self) -> int:
        """Tasks whose result is not known yet."""
        return len(self._busy)

    def submit(self, index: int, task: Any) -> None:
        """Start a task; its results carry `index`."""
        process, pipe = self._idle.pop() if self._idle else self._start()
        try:
            pipe.send(task)
        except BrokenPipeError:  # it was killed while it waited
            _end(process, pipe)
            return self.submit(index, task)
        self._busy[pipe] = process, index, time.monotonic() + self._timeout
        return None

    def results(self) -> list[tuple[int, Any, str | None]]:
        """Wait for some: (index, result, None) or (index, None, the reason why there is none).

        Raises:
            OSError: what a task met with, such as a full disk.
        """
        nearest = min(deadline for _, _, deadline in self._busy.values())
        # Some slack, so that the nearest is over when nothing was heard.
        ready = wait(list(self._busy), max(0.0, nearest - time.monotonic()) + 0.01)
        found = [self._receive(pipe) for pipe in ready if isinstance(pipe, Connection)]
        now = time.monotonic()
        for pipe, (process, index, deadline) in list(self._busy.items()):
            if deadline < now and pipe not in ready:
                del self._busy[pipe]
                _end(process, pipe)
                found.append((index, None, f"no progress within {self._timeout:g} s"))
        return [result for result in found if result is not None]

    def close(self) -> None:
        """Kill every process."""
        for process, pipe in [*self._idle, *((p, pipe) for pipe, (p, *_) in self._busy.items())]:
            _end(process, pipe)
        self._idle, self._busy = [], {}

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = _FORK.Pipe()
        # The child would otherwise hold the ends of its siblings open, and of its own.
        others = [ours, *(pipe for _, pipe in self._idle), *self._busy]
        process = _FORK.Process(
            target=_serve,
            args=(self._work, theirs, others, os.getpid(), self._max_memory),
            daemon=True,
        )
        process.start()
        theirs.close()
        return process, ours

    def _receive(self, pipe: Connection) -> tuple[int, Any, str | None] | None:
        process, index, _ = self._busy[pipe]
        try:
            kind, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            del self._busy[pipe]
            code = _end(process, pipe)
            how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit {code}"
            return index, None, f"its process died: {how}"
        if kind == "alive":
            self._busy[pipe] = process, index, time.monotonic() + self._timeout
            return None
        del self._busy[pipe]
        self._idle.append((process, pipe))
        if kind == "stop":
            raise OSError(*value)
        return (index, value, None) if kind == "done" else (index, None, value)


def _end(process: BaseProcess, pipe: Connection) -> int:
    pipe.close()
    process.kill()
    process.join()
    return process.exitcode or 0


def _serve(
    work: Work, pipe: Connection, others: list[Connection], parent: int, max_memory: int
) -> None:
    for other in others:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the parent's to handle
    die_with_parent(parent)
    limit_memory(max_memory)
    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        if time.monotonic() - last > _HEARTBEAT:
            last = time.monotonic()
            pipe.send(("alive", None))

    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = "done", work(task, alive)
        except OSError as error:
            answer = "stop", (error.errno, error.strerror, error.filename)
        except MemoryError:
            answer = "failed", "needs too much memory"
        except Exception as error:  # a defect of ours that one file shows is no reason to stop
            answer = "failed", f"{type(error).__name__}: {error}"
        pipe.send(answer)
