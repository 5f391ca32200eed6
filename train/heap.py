"""What the C library does with memory that a training on a CPU frees."""

import ctypes
import sys
from contextlib import suppress

# Parameters of mallopt(3), which Python has no names for.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 1 << 25


def keep_freed_memory() -> None:
    """Keep freed blocks of up to 32 MiB for the next ones, where the C library is glibc.

    A training step frees at its end what the next one takes again. By default glibc gives the
    memory back each time, and the kernel clears every page before it hands it out anew.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
