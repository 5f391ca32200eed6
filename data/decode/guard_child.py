"""The process behind DecodeGuard, which starts it."""

import ctypes
import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from longtake.data.decode import HeaderLimits, decode_clip, probe
from longtake.data.decode.containers import DecodeError

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answers requests from standard input until it is closed.

    Arguments: descriptors of payload and frames, bytes of memory allowed, process id of the owner.
    """
    payload, frames, max_memory, owner = map(int, sys.argv[1:])
    _live_with(owner)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    _limit_memory(max_memory)
    answers.write("{}\n")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            answer = _serve(request, payload, frames)
        except MemoryError:
            answer = {"error": "asks for more memory than there is", "is_damage": True}
        except ValueError as error:
            answer = {"error": str(error), "is_damage": isinstance(error, DecodeError)}
        answers.write(json.dumps(answer) + "\n")


def _serve(request: dict[str, Any], payload: int, frames: int) -> dict[str, Any]:
    data = os.pread(payload, request.pop("bytes"), 0)
    limits = HeaderLimits(**request.pop("limits"))
    if "times" not in request:
        return {"info": asdict(probe(data, limits=limits))}
    times, size = request.pop("times"), request.pop("size")
    clip = decode_clip(data, times, size=size and tuple(size), limits=limits, **request)
    view, position = memoryview(np.ascontiguousarray(clip.transpose(0, 3, 1, 2))).cast("B"), 0
    while position < len(view):
        position += os.pwrite(frames, view[position:], position)
    return {"shape": clip.shape}


def _live_with(owner: int) -> None:
    """The owner handles signals to the job; this process ends with it, even while it hangs."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it died before that took effect
        sys.exit()


def _limit_memory(size: int) -> None:
    """`size` bytes above what the process has mapped now; no core files."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, mapped + size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
