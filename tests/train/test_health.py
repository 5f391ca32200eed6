"""Signals and the quarantine of samples that are no good."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.data.plan import Exclusion
from longtake.train.health import Quarantine, StopSignal
from longtake.train.run_folder import mark, read_marker


def bad(sample_id: int, step: int = 0) -> Exclusion:
    return Exclusion(sample_id, step, f"clip {sample_id} is damaged")


def test_ranks_agree_whatever_the_order_of_the_reports(tmp_path: Path) -> None:
    one = Quarantine(tmp_path / "q.jsonl", 0.5, 1000)
    two = Quarantine(None, 0.5, 1000)
    assert one.agree([[bad(5), bad(3)], [bad(5)], []]) == [bad(3), bad(5)]
    two.agree([[], [bad(3), bad(5)], [bad(3)]])
    assert one.agree([[bad(5, 1)], [bad(9, 1)]]) == [bad(9, 1)]  # once is enough
    two.agree([[bad(9, 1)]])
    assert one.exclusions == two.exclusions == [bad(3), bad(5), bad(9, 1)]
    lines = (tmp_path / "q.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample_id"] for line in lines] == [3, 5, 9]


def test_a_checkpoint_carries_the_exclusions() -> None:
    before, after = Quarantine(None, 0.5, 10), Quarantine(None, 0.5, 10)
    before.agree([[bad(2**62 + 1, 3)]])
    after.load(json.loads(json.dumps(before.state())))
    assert after.exclusions == [bad(2**62 + 1, 3)]


def test_a_sample_may_be_left_out_from_an_earlier_step_on(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.5, 1000)
    quarantine.agree([[bad(5, step=19)]])
    assert quarantine.agree([[bad(5, step=16)]]) == [bad(5, step=16)]
    assert quarantine.agree([[bad(5, step=17)]]) == []
    resumed = Quarantine(None, 0.5, 1000)
    resumed.load([*quarantine.state(), *Quarantine.read_rows(tmp_path / "q.jsonl")])
    assert resumed.exclusions == [bad(5, step=19), bad(5, step=16)]
    assert resumed.num_samples == 1


@pytest.mark.parametrize(
    ("num_bad", "seen", "rows", "stops"),
    [
        (0, 0, 100, False),
        (5, 20, 10_000, False),  # a few bad ones at the start say little
        (11, 20, 10_000, True),
        (40, 1000, 10_000, False),
        (51, 1000, 10_000, True),
        (3, 10_000, 50, True),  # many epochs of a small set: its size counts
    ],
)
def test_too_many_bad_samples_stop_the_run(num_bad: int, seen: int, rows: int, stops: bool) -> None:
    quarantine = Quarantine(None, 0.05, rows)
    quarantine.agree([[bad(i) for i in range(num_bad)]])
    if not stops:
        quarantine.check(seen)
        return
    with pytest.raises(ValueError, match=r"data.max_bad_fraction=0.05(.|\n)*is damaged"):
        quarantine.check(seen)


def test_the_first_signal_is_noted_and_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    stop = StopSignal()
    try:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize(("echo_seconds", "code"), [(0.0, 1), (5.0, 0)])
def test_the_second_signal_aborts_unless_it_is_an_echo(echo_seconds: float, code: int) -> None:
    program = (
        "import os, signal, time\n"
        "from longtake.train import health\n"
        f"health.ECHO_SECONDS = {echo_seconds}\n"
        "health.StopSignal()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == code


def test_without_room_the_old_marker_takes_the_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(tmp_path, "RUNNING", step=1)

    def full(*args: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    mark(tmp_path, "FAILED")
    assert [path.name for path in tmp_path.iterdir()] == ["FAILED"]


def test_what_was_left_out_stays_left_out_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 0.5, 1000).agree([[bad(5, step=2)]])
    with path.open("a") as file:
        file.write('{"sample_id": 7, "from')  # a kill in the middle of the row
    resumed = Quarantine(path, 0.5, 1000)
    resumed.load(Quarantine.read_rows(path))
    assert resumed.exclusions == [bad(5, step=2)]
    assert resumed.agree([[bad(5, step=2)]]) == []
    resumed.agree([[bad(7, step=3)]])
    assert [row["sample_id"] for row in Quarantine.read_rows(path)] == [5, 7]


def test_one_marker_at_a_time(tmp_path: Path) -> None:
    assert read_marker(tmp_path) is None
    for marker in ("RUNNING", "PREEMPTED", "RUNNING", "FAILED", "FINISHED"):
        mark(tmp_path, marker, step=3)
        assert read_marker(tmp_path) == marker
        assert [path.name for path in tmp_path.iterdir()] == [marker]
    assert json.loads((tmp_path / "FINISHED").read_text())["step"] == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has PDEATHSIG")
def test_a_worker_does_not_outlive_its_launcher(tmp_path: Path) -> None:
    worker = (
        "import os, pathlib, sys, time; from longtake.data.processes import die_with_parent;"
        "die_with_parent(os.getppid());"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    )
    launcher = (
        "import subprocess, sys;"
        "subprocess.run([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)"
    )
    name = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", launcher, worker, str(name)])
    wait_for(lambda: name.exists() and name.read_text() != "")
    pid = int(name.read_text())
    process.kill()
    process.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
