"""What a log row says of time: where it went on each rank, and what part of it was of use."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from longtake.train.attempts import Attempts, read_record
from longtake.train.engine import Ranks, single_process
from longtake.train.step_times import StepTimes, Work


def ticking(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """A clock that shows these times, one after the other."""
    monkeypatch.setattr(time, "perf_counter", iter(itertools.accumulate(seconds)).__next__)


def test_the_slowest_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 5 s: 1 s for data, 2 s for others and 1 s of own work in each."""
    ticking(monkeypatch, 0, *(0, 1, 0, 2, 0, 1, 1) * 2, 0, 0)
    others = [10.0, 6.0, 0.0, 2.0, 2.0, 1.5, 0.0]  # of the other rank: data 3 s a step
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: [mine, others])
    times = StepTimes(single_process(), peak_flops=1e3)
    for _ in range(2):
        with times.waiting_for_data():
            pass
        with times.waiting_for_others():
            pass
        with times.working():
            pass
        time.perf_counter()
        times.count(Work(samples=4, frames=20, tokens=80, flops=5000.0))
    row, by_rank = times.read()
    row.pop("memory_gb")
    assert row == {
        "seconds_per_step": 5.0,
        "samples_per_second": 0.8,
        "frames_per_second": 4.0,
        "tokens_per_second": 16.0,
        "data_wait": 0.6,
        "rank_wait": 0.2,
        "slowest_rank": 1.0,
        "imbalance": pytest.approx(4 / 3),
        "mfu": 0.5,
    }
    assert by_rank == {
        "step": [5.0, 5.0],
        "data": [1.0, 3.0],
        "others": [2.0, 0.0],
        "own": [1.0, 1.0],
        "rest": [1.0, 1.0],
    }
    assert times.useful == 4.0  # all but the wait for data


def test_time_is_counted_over_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now: Any = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    first = Attempts(tmp_path, 3)
    now = 1060.0
    assert (first.seconds(), first.since_first_start()) == (60.0, 60.0)
    first.close()
    now = 5000.0
    second = Attempts(tmp_path, 3)
    now = 5010.0
    assert (second.seconds(), second.since_first_start()) == (70.0, 4010.0)
    second.close()
    assert read_record(tmp_path)["attempts"] == second.number == 2
