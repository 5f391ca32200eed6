"""The run folder: one marker file that says how the run stands, and where its parts lie."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

RUNNING, PREEMPTED, FAILED, FINISHED = "RUNNING", "PREEMPTED", "FAILED", "FINISHED"
MARKERS = (RUNNING, PREEMPTED, FAILED, FINISHED)
CONFIG, METRICS, QUARANTINE = "config.yaml", "metrics.jsonl", "quarantine.jsonl"
CHECKPOINTS, SAMPLES = "checkpoints", "samples"


def mark(folder: Path, marker: str, **details: str | int) -> None:
    """Leave `marker` as the folder's only one; it holds the time and `details` as JSON.

    The new one is there before the old ones go: launchers never find none. Any rank may call it.
    """
    assert marker in MARKERS
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{marker}.tmp-{os.getpid()}"
    scratch.write_text(json.dumps({"time": time.time(), **details}) + "\n", encoding="utf-8")
    os.replace(scratch, folder / marker)
    for other in MARKERS:
        if other != marker:
            (folder / other).unlink(missing_ok=True)


def read_marker(folder: Path) -> str | None:
    """The marker of a run folder, None where no run has started."""
    found = [marker for marker in MARKERS if (folder / marker).exists()]
    return found[0] if found else None
