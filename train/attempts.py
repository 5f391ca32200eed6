"""The starts of a run: what became of the last ones, and what part of its time was of use."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from longtake.train.run_folder import FAILED, RUNNING, read_marker, write_json

RECORD, HEARTBEAT = "run.json", "heartbeat"
BEAT_SIZE = 100  # bytes, written in place: a reader never sees half of two


class Attempts:
    """Rank 0's record of a run folder over all its starts, in run.json and heartbeat.

    The heartbeat names the step in work: after a death by SIGKILL nothing else does.
    """

    def __init__(self, folder: Path, max_same_step: int) -> None:
        """Begins an attempt.

        RuntimeError where the last `max_same_step` of them (0: any number) all died at one step.
        """
        self.folder = folder
        self._record = read_record(folder)
        self._record["deaths"] = deaths = self._deaths()
        if max_same_step and len(deaths) >= max_same_step:
            raise RuntimeError(
                f"the last {len(deaths)} attempts all ended at step {deaths[-1]}: "
                f"train.max_same_step={max_same_step}. Look at the log of the last one, at "
                f"{folder}/FAILED and {folder}/hangs; when the cause is gone, resume=force goes on"
            )
        self._record["attempts"] += 1
        write_json(folder / RECORD, self._record)
        self._earlier = self._record["seconds"]
        self._since = time.time()
        flags = os.O_RDWR | os.O_CREAT
        self._beat = os.open(folder / HEARTBEAT, flags, 0o644)

    @property
    def number(self) -> int:
        """Of the present one, from 1."""
        return self._record["attempts"]

    def _deaths(self) -> list[int]:
        """Steps at which the last attempts ended badly, in a row and all alike."""
        try:
            beat = json.loads((self.folder / HEARTBEAT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []  # none has come to a step
        if read_marker(self.folder) not in (RUNNING, FAILED):
            return []
        known = self._record["deaths"]
        if beat["attempt"] != self._record["attempts"]:
            return known  # it ended before its first step: that says nothing of one
        return [*(step for step in known if step == beat["step"]), beat["step"]]

    def beat(self, step: int) -> None:
        """Step number `step` begins."""
        text = json.dumps({"attempt": self.number, "step": step, "time": time.time()})
        os.pwrite(self._beat, text.ljust(BEAT_SIZE - 1).encode() + b"\n", 0)

    def seconds(self) -> float:
        """That the run was up in all attempts; in one that was killed, until its last row."""
        self._record["seconds"] = self._earlier + time.time() - self._since
        write_json(self.folder / RECORD, self._record)
        return self._record["seconds"]

    def since_first_start(self) -> float:
        """Seconds since the first attempt began, whatever happened in between."""
        return time.time() - self._record["started"]

    def close(self) -> None:
        os.close(self._beat)


def read_record(folder: Path) -> dict[str, Any]:
    """What run.json says of a run folder; that of a new one where there is none."""
    now = time.time()
    new = {"attempts": 0, "wandb_id": uuid.uuid4().hex[:8]}
    new |= {"started": now, "seconds": 0.0, "deaths": []}
    path = folder / RECORD
    return new | json.loads(path.read_text(encoding="utf-8")) if path.exists() else new
