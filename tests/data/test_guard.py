import gc
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longtake.data.decode import DecodeError, HeaderLimits, decode_clip, encode_video, probe
from longtake.data.decode.guard import DecodeGuard
from tests.data.toy import toy_frames, toy_video

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is for Linux")

TIMES = [i / 8 for i in range(9)]


@pytest.fixture
def guard() -> Iterator[DecodeGuard]:
    guard = DecodeGuard(timeout=60, max_memory=2**29)
    yield guard
    guard.close()


def _pid(guard: DecodeGuard) -> int:
    assert guard._child is not None
    return guard._child._process.pid


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_equal_frames_errors_and_one_child(guard: DecodeGuard) -> None:
    data = toy_video(0)
    assert guard.probe(data) == probe(data)
    pid = _pid(guard)
    frames = guard.decode_clip(data, TIMES)
    assert np.array_equal(frames, decode_clip(data, TIMES))
    frames[:] = 0  # owned by the caller
    small = guard.decode_clip(data, [0.5], size=(16, 24), resize="antialias")
    assert np.array_equal(small, decode_clip(data, [0.5], size=(16, 24), resize="antialias"))
    big = encode_video(toy_frames(1, 5, 240, 320), 8)  # both memories grow
    assert np.array_equal(guard.decode_clip(big, [0.0, 0.5]), decode_clip(big, [0.0, 0.5]))
    with pytest.raises(DecodeError, match="empty file"):
        guard.decode_clip(b"", [0.0])
    with pytest.raises(DecodeError, match="over the limit"):
        guard.probe(data, limits=HeaderLimits(max_side=16))
    with pytest.raises(ValueError, match=r"data\.decoder='opencv'"):
        guard.decode_clip(data, [0.0], decoder="opencv")
    assert _pid(guard) == pid


def test_a_child_that_hangs_is_killed_and_replaced(guard: DecodeGuard) -> None:
    data = toy_video(0)
    guard.probe(data)
    pid = _pid(guard)
    guard._timeout = 0.3
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DecodeError, match=r"decoding took over 0\.3 s"):
        guard.decode_clip(data, TIMES)
    assert not Path(f"/proc/{pid}").exists()  # dead and reaped
    guard._timeout = 60
    assert guard.decode_clip(data, TIMES).shape == (9, 32, 32, 3)
    assert _pid(guard) != pid


def test_a_child_killed_while_it_decodes_is_named_and_replaced(guard: DecodeGuard) -> None:
    data = toy_video(0)
    guard.probe(data)
    pid = _pid(guard)
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(DecodeError, match=r"decoder died: SIGKILL \(memory limit 512 MiB\)"):
        guard.decode_clip(data, TIMES)
    killer.join()
    assert guard.probe(data).frames == 9


def test_a_child_found_dead_costs_nothing(guard: DecodeGuard) -> None:
    data = toy_video(0)
    guard.probe(data)
    pid = _pid(guard)
    os.kill(pid, signal.SIGKILL)
    _wait(lambda: _is_gone(pid))
    assert guard.probe(data).frames == 9


def test_memory_has_a_limit_and_the_child_survives_it() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (5900, 5900)).save(buffer, "PNG")
    guard = DecodeGuard(60, 2**27)
    with pytest.raises(DecodeError, match="asks for more memory"):
        guard.decode_clip(buffer.getvalue(), [0.0] * 4)
    assert guard.probe(toy_video(0)).frames == 9
    guard.close()


def test_signals_to_the_job_leave_it_alive(guard: DecodeGuard) -> None:
    guard.probe(toy_video(0))
    pid = _pid(guard)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(pid, number)
    assert guard.probe(toy_video(0)).frames == 9 and _pid(guard) == pid


def _probe_in_fork(
    guard: DecodeGuard, parents: int, answers: "multiprocessing.Queue[bool]"
) -> None:
    frames = guard.probe(toy_video(0)).frames
    answers.put(frames == 9 and _pid(guard) != parents)


def test_forked_daemons_and_pickles_have_their_own_child(guard: DecodeGuard) -> None:
    data = toy_video(0)
    guard.probe(data)
    pid = _pid(guard)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    fork = context.Process(target=_probe_in_fork, args=(guard, pid, answers), daemon=True)
    fork.start()
    assert answers.get(timeout=60)
    fork.join(60)
    copy = pickle.loads(pickle.dumps(guard))
    assert copy.probe(data).frames == 9 and _pid(copy) != pid
    copy.close()
    assert guard.probe(data).frames == 9 and _pid(guard) == pid


@pytest.mark.parametrize("end", ["close", "forget"])
def test_no_child_is_left_behind(end: str) -> None:
    guard = DecodeGuard(60, 2**29)
    guard.close()  # never started
    guard.probe(toy_video(0))
    pid = _pid(guard)
    if end == "close":
        guard.close()
    del guard
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_it_dies_with_its_parent(stopped: bool) -> None:
    code = (
        "import sys, time; from longtake.data.decode.guard import DecodeGuard\n"
        "guard = DecodeGuard(60, 2**29)\n"
        "try: guard.probe(b'')\n"
        "except ValueError: print(guard._child._process.pid, 'torch' in sys.modules, flush=True)\n"
        "time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid, has_torch = parent.stdout.readline().split()
        assert has_torch == b"False"
        if stopped:
            os.kill(int(pid), signal.SIGSTOP)
        parent.kill()
    _wait(lambda: _is_gone(int(pid)))


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        DecodeGuard(0, 2**29)
