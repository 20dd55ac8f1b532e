"""Keeps the memory that torch has freed on the CPU for its next tensors."""

from __future__ import annotations

import ctypes


# <malloc.h> of glibc
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tells glibc to give no freed memory back to the system, for the rest of this process; False without glibc.

    On the CPU torch allocates each tensor by malloc, which by default maps a large one anew each time and unmaps it
    when it is freed, so that every page of every result is first touched through a page fault; these take a good part
    of a training step. The process stays as large as it once was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no handle of the process itself
        return False
    # 1 says that the value was taken; -1 as a threshold means never
    return bool(mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1)
