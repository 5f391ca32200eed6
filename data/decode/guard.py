"""Decoding in a child that can be killed, for clips from the internet.

A signal does not interrupt a decoder that hangs in C code, and a header of a few bytes can ask for
gigabytes. So clips go to a persistent child (guard_child.py) with a time limit for each call and a
limit on its memory. It is started afresh, never forked from here, so that any process may own one:
a forked DataLoader worker, a daemon, a process that uses CUDA. Requests and answers are lines of
JSON over pipes; clip and frames go through shared memory (memfd). Linux only.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from longtake.data.decode import HeaderLimits, VideoInfo
from longtake.data.decode.containers import DecodeError

# The owner's import paths come last, where they cannot hide the standard library.
_MAIN = (
    "import sys, json; sys.path += json.loads(sys.argv.pop(1)); "
    "from longtake.data.decode.guard_child import main; main()"
)
_START_SECONDS = 120.0  # to import its libraries on a busy machine
_KEPT_BYTES = 2**26  # of shared memory between calls


class DecodeGuard:
    """`decode_clip` and `probe` in a child process, which the first call starts.

    `timeout` is in seconds for each call; `max_memory` in bytes above what the child needs for its
    libraries. After a fork or through pickle the copy starts a child of its own. Calls must come
    from one thread at a time, and the child ends with the thread that started it.
    """

    def __init__(self, timeout: float, max_memory: int) -> None:
        if not timeout > 0 or max_memory <= 0:
            raise ValueError(f"timeout={timeout} and max_memory={max_memory} must be positive")
        self._timeout, self._max_memory = timeout, max_memory
        self._child: _Child | None = None

    def decode_clip(
        self,
        data: bytes,
        times: Sequence[float],
        *,
        decoder: str = "auto",
        size: tuple[int, int] | None = None,
        limits: HeaderLimits | None = None,
        resize: str = "fast",
        frame_size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Frames as of `longtake.data.decode.decode_clip`, RGB uint8 (T, H, W, 3), bit for bit.

        Raises:
            DecodeError: also where the child took too long, died or ran out of memory.
            ValueError: as there.
        """
        request = {
            "times": [float(moment) for moment in times],
            "decoder": decoder,
            "size": size,
            "limits": asdict(limits or HeaderLimits()),
            "resize": resize,
            "frame_size": frame_size,
        }
        answer = self._ask(data, request)
        assert self._child is not None
        return self._child.frames(answer["shape"])

    def probe(self, data: bytes, *, limits: HeaderLimits | None = None) -> VideoInfo:
        """As `longtake.data.decode.probe`, with the same errors and those of the child."""
        answer = self._ask(data, {"limits": asdict(limits or HeaderLimits())})
        return VideoInfo(**answer["info"])

    def close(self) -> None:
        """Ends the child; the next call starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _ask(self, data: bytes, request: dict[str, Any]) -> dict[str, Any]:
        child = self._child
        if child is None or not child.is_usable():
            self.close()
            self._child = child = _Child(self._max_memory)
        try:
            answer = child.ask(data, request, self._timeout)
        except _ChildLost as loss:
            self.close()
            raise DecodeError(str(loss)) from None
        except BaseException:  # an interrupt would leave half an answer in the pipe
            self.close()
            raise
        if "error" in answer:
            raise (DecodeError if answer["is_damage"] else ValueError)(answer["error"])
        return answer

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_child": None}


class _ChildLost(Exception):
    """The child gave no answer; the message is the reason."""


class _Child:
    """The process, its pipes and the two pieces of shared memory."""

    def __init__(self, max_memory: int) -> None:
        self._owner, self._max_memory = os.getpid(), max_memory
        self._payload = os.memfd_create("longtake-payload")
        self._frames = os.memfd_create("longtake-frames")
        self._payload_size = 0
        numbers = (self._payload, self._frames, max_memory, self._owner)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, json.dumps(sys.path), *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(self._payload, self._frames),
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # each thread takes memory
            process_group=0,  # Ctrl-C is for the owner
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._started = False

    def is_usable(self) -> bool:
        """Whether this process owns it and it lives."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, data: bytes, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            _ChildLost: no answer in time, or no child any more.
        """
        if not self._started:
            self._read_line(_START_SECONDS)
            self._started = True
        if len(data) > self._payload_size or self._payload_size > _KEPT_BYTES:
            os.ftruncate(self._payload, len(data))
            self._payload_size = len(data)
        _write_all(self._payload, data)
        line = json.dumps(request | {"bytes": len(data)}).encode() + b"\n"
        try:
            self._stdin.write(line)
        except BrokenPipeError:
            raise _ChildLost(self._death()) from None
        return json.loads(self._read_line(timeout))

    def frames(self, shape: list[int]) -> np.ndarray:
        """(T, H, W, 3) uint8, a copy; the child keeps them as (T, 3, H, W)."""
        count, height, width, channels = shape
        clip = np.empty((count, channels, height, width), np.uint8)
        view, position = memoryview(clip).cast("B"), 0
        while position < len(view):
            position += os.preadv(self._frames, [view[position:]], position)
        if len(view) > _KEPT_BYTES:
            os.ftruncate(self._frames, 0)
        return clip.transpose(0, 2, 3, 1)

    def close(self) -> None:
        """Kills and reaps the child if it is ours; otherwise only lets go of it."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        else:
            self._process.returncode = 0  # not ours to wait for
        self._stdin.close()
        self._stdout.close()
        os.close(self._payload)
        os.close(self._frames)

    def _read_line(self, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise _ChildLost(f"decoding took over {timeout:g} s")
            part = self._stdout.read(65536)
            if not part:
                raise _ChildLost(self._death())
            line += part
        return line

    def _death(self) -> str:
        status = self._process.wait()
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        return f"decoder died: {how} (memory limit {self._max_memory / 2**20:.0f} MiB)"


def _write_all(descriptor: int, data: bytes) -> None:
    view, position = memoryview(data), 0
    while position < len(view):
        position += os.pwrite(descriptor, view[position:], position)
