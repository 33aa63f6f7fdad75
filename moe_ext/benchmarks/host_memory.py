"""The C library's allocator while peers are timed in one process."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the two settings (mallopt(3))."""


def keep_freed_memory() -> bool:
    """Whether freed memory now stays with this process for its next use, as a GPU's caching
    allocator keeps it; False where the C library is not glibc.

    By default glibc gives a block of 32 MiB or more back to the kernel when it is freed, which
    zeroes its pages, and the process touches each for the first time, at every use: up to three
    times a peer's own time, in a benchmark of what it computes. It is no setting for training: glibc
    before 2.38 does not find an aligned block of the same size again, so that a process can grow.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
