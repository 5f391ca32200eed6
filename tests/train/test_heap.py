"""Trainings on a CPU keep the memory that they free."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny_runs import options, train_here

# In a fresh process: other mappings teach glibc a larger threshold.
_FREED = """
import ctypes
from longtake.train.heap import keep_freed_memory

class Usage(ctypes.Structure):  # mallinfo(3)
    _fields_ = [(f"field_{index}", ctypes.c_int) for index in range(10)]

libc = ctypes.CDLL(None)
libc.mallinfo.restype, libc.malloc.restype = Usage, ctypes.c_void_p

def kept():
    block = ctypes.c_void_p(libc.malloc(30 << 20))
    before = libc.mallinfo().field_8  # bytes that are free
    libc.free(block)
    return libc.mallinfo().field_8 - before >> 20

print(kept(), keep_freed_memory(), kept())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_glibc_keeps_a_freed_block() -> None:
    done = subprocess.run([sys.executable, "-c", _FREED], check=True, capture_output=True)
    assert done.stdout.decode().split() == ["0", "True", "30"]


def test_a_training_on_a_cpu_asks_for_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("longtake.train.setup.keep_freed_memory", lambda: asked.append(True))
    assert train_here(options(shards, tmp_path, "train.steps=1")) == 0
    assert asked == [True]
