"""What the C library does with memory that a training on a CPU frees."""

import ctypes
import sys

# Parameters of mallopt(3), which Python has no names for.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 1 << 25


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 32 MiB for the next ones; whether the C library agreed (glibc).

    A training step frees at its end what the next one takes again. By default glibc gives the
    memory back each time, and the kernel clears every page before it hands it out anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another C library
        return False
    settings = (_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return all(mallopt(*setting) for setting in settings)  # 0: refused
