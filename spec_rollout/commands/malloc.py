"""The C library's memory allocator, as a process that computes forward passes on a CPU wants it."""

from __future__ import annotations

import ctypes
import os

# mallopt's names of what it sets, from malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_HEAP_BLOCK = 32 << 20  # glibc's own limit
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Has glibc keep up to 1 GiB of freed memory instead of handing it back to the kernel.

    Every operation of a forward pass allocates its result anew. By default glibc returns blocks of
    some megabytes at once, and the kernel clears their pages again a moment later: tens of
    thousands of page faults in a rollout step of the demo. For programs to call at their start, not
    for libraries: it is the whole process's allocator.

    Returns:
        Whether it is set: not where the C library is another one, or where the environment tunes
            glibc already.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in (
            (_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK),
            (_TRIM_THRESHOLD, _KEPT_BYTES),
        )
    )
