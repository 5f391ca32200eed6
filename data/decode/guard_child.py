"""The process behind DecodeGuard, which starts it."""

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
from longtake.data.processes import die_with_parent, limit_memory


def main() -> None:
    """Answers requests from standard input until it is closed.

    Arguments: descriptors of payload and frames, bytes of memory allowed, process id of the owner.
    """
    payload, frames, max_memory, owner = map(int, sys.argv[1:])
    # The owner handles signals to the job; this process ends with it, even while it hangs.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(owner)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    limit_memory(max_memory)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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
