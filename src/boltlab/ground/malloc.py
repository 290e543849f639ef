"""What this process does with memory that it frees."""

import os
from contextlib import suppress


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is glibc.

    glibc gives large blocks back to the system at once, which clears every page of them when they are asked for again:
    a quarter of a convolutional net's training step on a CPU, and four fifths of a batch's normalization. What a user
    has set in the environment (MALLOC_…) is left as it is.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError, TypeError):  # another C library, another system
        import ctypes

        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
