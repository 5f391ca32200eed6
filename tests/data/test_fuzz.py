"""Damaged tars and clips end in a reason: no crash, no hang, no other error, bounded memory."""

import json
import subprocess
import sys

import pytest


def fuzz(kind: str, first: int, count: int, seconds: float) -> dict[str, int]:
    """Run in a process of its own, as FFmpeg could take it down; `seconds` is far beyond need."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.data.fuzzing", kind, str(first), str(count)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ends = json.loads(run.stdout)
    assert sum(number for end, number in ends.items() if end != "slowest_ms") == count
    return ends


@pytest.mark.parametrize(("kind", "end"), [("tar", "refused"), ("clip", "rejected")])
def test_damaged_bytes_end_in_a_reason(kind: str, end: str) -> None:
    ends = fuzz(kind, 0, 1000, 300)
    assert ends[end] > 100 and ends["read"] > 10, ends


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "clip"])
def test_many_damaged_bytes_end_in_a_reason(kind: str) -> None:
    fuzz(kind, 1000, 7000, 600)
