"""Memory that a training step gives back stays with the process, on Linux with glibc."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """For a process that trains on CPUs: the next step takes what the last one freed, instead of pages from the system,
    which clears each of them first (a fifth of an epoch of recipe `study`). False where there is no such setting.

    For programs to call, not libraries: the whole process keeps its memory from here on.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
