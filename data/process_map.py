"""Work on many shards over processes that never outlive their parent, and its progress bar."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longtake.data.processes import die_with_parent

Job = TypeVar("Job")
Result = TypeVar("Result")


def map_processes(
    work: Callable[[Job], Result], jobs: Sequence[Job], num_workers: int
) -> Iterator[Result]:
    """Results of `work(job)` as they are done, in any order; in this process for one worker.

    Leaving the loop early, by Ctrl-C or an error, kills the workers in the middle of their jobs: a
    job must leave nothing half done that the next run would take for done.

    Raises:
        OSError: a worker was killed. What `work` raises is raised here.
    """
    if num_workers <= 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    others = set(multiprocessing.active_children())
    # A fork starts at once, and needs no importable main module.
    pool = ProcessPoolExecutor(
        min(num_workers, len(jobs)), multiprocessing.get_context("fork"), _start_worker
    )
    queue = iter(jobs)
    waiting: set[Future[Result]] = set()
    try:
        waiting |= {pool.submit(work, job) for job in islice(queue, 2 * num_workers)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(work, job) for job in islice(queue, len(done))}
            for future in done:
                yield future.result()
    except BaseException as error:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError(
                "a worker process was killed (out of memory?); what is done is kept: "
                "run the command again, with fewer --workers"
            ) from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C reaches the whole process group: workers go at once, without a traceback each."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    die_with_parent(parent.pid)


@contextmanager
def sample_bar(title: str, num_shards: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar over shards on stderr; call what it yields with the samples of each finished shard."""
    rate = TextColumn("{task.fields[samples]} samples, {task.fields[rate]:.0f}/s")
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(title, total=num_shards, samples=0, rate=0.0)

        def advance(samples: int) -> None:
            total = bar.tasks[0].fields["samples"] + samples
            rate = total / max(bar.tasks[0].elapsed or 0.0, 1e-3)
            bar.update(task, advance=1, samples=total, rate=rate)

        yield advance
