"""Memory of the process on a CPU: keeping what was freed, so that the next step need not fault it in again."""

import ctypes
import sys

# <malloc.h> of glibc: requests are never mapped apart, the heap is never cut, and all threads share one heap.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 4096


def keep_memory() -> bool:
    """Makes the C library keep freed memory instead of giving it back to the system.

    XLA takes the temporaries of a program anew at every call. glibc gets blocks of this size from the system and gives
    them back when they are freed, so that each call faults in every page again, which costs about a quarter second a
    GB. Call this before the first large array, in programs that repeat one step. The price is the peak: freed memory
    of other sizes stays with the process too, so resident memory grows by a third or so.

    Returns:
        Whether the setting was taken; False on systems without glibc, where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl ignores mallopt
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_ARENA_MAX: 1}
    return all(library.mallopt(name, value) == 1 for name, value in settings.items())
