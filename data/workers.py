"""Processes that work on items ahead of time and hand the results back in order.

Unlike torch's DataLoader, whose workers write into one pipe under one lock, each has a pipe of its
own: one that is killed in the middle of a result breaks neither the others nor the reader, and is
replaced alone.
"""

import faulthandler
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, Generic, NoReturn, TypeVar
from weakref import WeakSet

import torch
import torch.multiprocessing  # teaches connections to hand tensors over in shared memory
from torch._utils import ExceptionWrapper

from longtake.data.processes import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_DEATHS = 3
"""A worker that dies so often over one item ends the run."""

_POLL = 1.0  # seconds between looks at whether the other side still lives
_GRACE = 5.0  # seconds for a process to end
_ASK_STACKS = signal.SIGUSR2
_ANSWER = 0.3  # seconds for a process to write its stacks
# A fork copies them all; a worker must not hold the pipes of others open.
_parents_ends: WeakSet[Connection] = WeakSet()


class Workers(Generic[Item, Result]):
    """Yields `work(item)` for each item, in order, from `num_workers` processes.

    Each of them has up to `ahead` items, which wait or are done. One that is killed (by the kernel
    when memory runs out, say) is reported as a warning and replaced, and the new one gets its items
    again, one at a time, so that one that kills is known: the results must depend on items alone.
    """

    def __init__(
        self, work: Callable[[Item], Result], items: Iterator[Item], *, num_workers: int, ahead: int
    ) -> None:
        self._items = items
        self._workers = [_Worker[Item, Result](work) for _ in range(num_workers)]
        self._ahead = ahead
        # Not weakref.finalize: at exit multiprocessing would wait for the workers before that.
        self._finalize = Finalize(self, _close, (self._workers,), exitpriority=10)

    def __iter__(self) -> Iterator[Result]:
        """Raises:
        ChildProcessError: workers died MAX_DEATHS times in a row over one item; it is named.
        """
        for _ in range(self._ahead):
            for worker in self._workers:
                self._give(worker)
        while True:
            for worker in self._workers:
                if not worker.items:
                    return
                result = worker.take()
                self._give(worker)
                yield result

    def describe(self) -> str:
        """What each process has in hand and where it stands in its code; any thread may ask."""
        for worker in self._workers:
            worker.ask_stacks()
        time.sleep(_ANSWER)
        return "\n".join(worker.describe() for worker in self._workers)

    def close(self) -> None:
        """End all processes; those that do not end by themselves are killed."""
        self._finalize()

    def _give(self, worker: "_Worker[Item, Result]") -> None:
        for item in self._items:
            worker.give(item)
            return


class _Worker(Generic[Item, Result]):
    """A process, seen from its parent."""

    def __init__(self, work: Callable[[Item], Result]) -> None:
        self._work = work
        self.items: deque[Item] = deque()  # given and not taken back
        self._num_sent = 0  # of them, to the present process
        self._num_suspects = 0  # of them, that may have killed one: they go one at a time
        self._start()

    def give(self, item: Item) -> None:
        self.items.append(item)
        if not self._num_suspects:
            self._send_next()

    def take(self) -> Result:
        """The result of the oldest item."""
        deaths = 0
        while True:
            if not self._num_sent:
                self._send_next()
            try:
                result = self._receive()
                break
            except (EOFError, OSError) as error:  # it is gone, or what it held for a tensor
                self.process.join(_GRACE)
                if self.process.is_alive():
                    raise error
                deaths += 1
            self._replace(deaths)
        self.items.popleft()
        self._num_sent -= 1
        self._num_suspects = max(0, self._num_suspects - 1)
        while not self._num_suspects and self._num_sent < len(self.items):
            self._send_next()
        if isinstance(result, ExceptionWrapper):
            result.reraise()
        return result

    def ask_stacks(self) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, _ASK_STACKS)

    def describe(self) -> str:
        self._stacks.seek(0)
        code, items = self.process.exitcode, ", then ".join(map(str, self.items))
        return (
            f"worker process {self.process.pid} {'runs' if code is None else f'ended, {code}'}, in "
            f"hand: {items or 'nothing'}\n{self._stacks.read().decode(errors='replace')}"
        )

    def hang_up(self) -> None:
        """Let the process end: it sees the closed pipe after the item in work."""
        self._connection.close()

    def close(self, patience: float) -> None:
        self.hang_up()
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()
        self._stacks.close()

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("fork")  # at once, and without a main module
        self._connection, theirs = context.Pipe()
        _parents_ends.add(self._connection)
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        # Not a daemon: those may have no children, and clips may be decoded in one.
        self.process = context.Process(
            target=_run, args=(self._work, theirs, self._stacks.fileno()), daemon=False
        )
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def _receive(self) -> Any:
        while not self._connection.poll(_POLL):
            if not self.process.is_alive() and not self._connection.poll(0):
                raise EOFError
        return self._connection.recv()

    def _send_next(self) -> None:
        item = self.items[self._num_sent]
        self._num_sent += 1
        try:
            self._connection.send(item)
        except OSError:
            return  # it died; take() notices and gives the item again

    def _replace(self, deaths: int) -> None:
        code, item = self.process.exitcode, self.items[0]
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        if deaths == MAX_DEATHS:
            raise ChildProcessError(
                f"data loader worker died {deaths} times in a row at {item}, last by {how}; "
                "out of memory? Lower data.num_workers, or set it to 0 to see the error"
            )
        warnings.warn(
            f"data loader worker died ({how}) at {item} or soon after; another one goes on there",
            RuntimeWarning,
            stacklevel=4,
        )
        self.close(0.0)
        self._num_suspects = max(self._num_suspects, self._num_sent)
        self._num_sent = 0
        self._start()


class Ahead(Generic[Result]):
    """Runs an iterator in a thread of this process, up to `limit` results ahead."""

    def __init__(self, results: Iterator[Result], limit: int) -> None:
        self._results = results
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(limit)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="data loader ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Result]:
        while True:
            is_result, value = self._queue.get()
            if is_result:
                yield value
            elif value is None:
                return
            else:
                raise value

    def close(self) -> None:
        """End the thread after the result in work."""
        self._closed.set()
        while not self._queue.empty():
            self._queue.get()
        self._thread.join()

    def _fill(self) -> None:
        try:
            for result in self._results:
                self._queue.put((True, result))
                if self._closed.is_set():
                    return
            self._queue.put((False, None))
        except Exception as error:
            self._queue.put((False, error))


def _close(workers: list[_Worker[Any, Any]]) -> None:
    for worker in workers:
        worker.hang_up()
    for worker in workers:
        worker.close(_GRACE)


def _run(work: Callable[[Any], Any], connection: Connection, stacks: int) -> NoReturn:
    """What a worker does until its parent closes the pipe or is gone; asked by a signal, it writes
    the stacks of its threads into the file `stacks`."""
    faulthandler.register(_ASK_STACKS, file=stacks)
    parent = os.getppid()
    die_with_parent(parent)  # one that hangs would not notice
    for end in list(_parents_ends):
        end.close()
    # A scheduler signals every process; the training one finishes its step and needs its data.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    try:
        while True:
            while not connection.poll(_POLL):
                if os.getppid() != parent:
                    raise EOFError
            item = connection.recv()
            try:
                result = work(item)
            except Exception:
                result = ExceptionWrapper(where=f"in a data loader worker at {item}")
            connection.send(result)
    except (EOFError, OSError):
        sys.exit(0)
