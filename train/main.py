"""The entry of a training process: `python -m longtake.train`, under torchrun or alone.

Exit codes: 0 finished, 1 failed, 75 preempted (the same command goes on where it stopped). The run
folder holds one marker file, RUNNING, PREEMPTED, FAILED or FINISHED, that says the same.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra

from longtake.data.processes import die_with_parent
from longtake.train.config import parse_config
from longtake.train.engine import shutdown
from longtake.train.run_folder import FAILED, LAUNCHED, PREEMPTED, mark
from longtake.train.setup import build, check, join
from longtake.train.trainer import Training, train

EXIT_FINISHED, EXIT_FAILED, EXIT_PREEMPTED = 0, 1, 75


def run(cfg: Any) -> int:
    """Train the composed config to its end; returns the exit code of the process."""
    try:
        prepared = check(parse_config(cfg))
    except (ValueError, OSError) as error:
        _complain(error)
        return EXIT_FAILED
    if _was_preempted(prepared.folder):
        return EXIT_PREEMPTED
    try:
        ranks, lock = join(prepared)
    except (ValueError, OSError, RuntimeError) as error:
        _complain(error)  # the folder is not ours: its marker stays
        return EXIT_FAILED
    try:
        return _train(build(prepared, ranks))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        _complain(error)
        mark(prepared.folder, FAILED, error=f"{type(error).__name__}: {error}")
        return EXIT_FAILED
    finally:
        if lock is not None:
            lock.release()


def _was_preempted(folder: Path) -> bool:
    """Whether torchrun starts again what a signal has ended: it does so after any code but 0."""
    marker = folder / PREEMPTED
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not marker.exists():
        return False
    return marker.stat().st_mtime > float(os.environ.get(LAUNCHED, "inf"))


def _train(training: Training) -> int:
    code = EXIT_FAILED
    try:
        code = EXIT_FINISHED if train(training) else EXIT_PREEMPTED
    finally:
        training.close(code)
    return code


def _complain(error: BaseException) -> None:
    """One line for a mistake of the user, a traceback for one of ours or with LONGTAKE_DEBUG=1."""
    rank = os.environ.get("RANK", "0")
    who = "longtake.train" if rank == "0" else f"longtake.train (rank {rank})"
    if not isinstance(error, ValueError | OSError) or os.environ.get("LONGTAKE_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"{who}: {error}", file=sys.stderr, flush=True)


@hydra.main(version_base="1.3", config_path="pkg://longtake.conf", config_name="config")
def main(cfg: Any) -> None:
    """Compose `conf/` with the command line, train, leave with the exit code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun puts each worker into a session of its own: killed itself, it would leave them
        # training in a folder that the next attempt also writes to.
        die_with_parent(os.getppid())
    shutdown(run(cfg))
