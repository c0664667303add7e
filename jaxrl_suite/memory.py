"""Memory of the process on a CPU: keeping what was freed, so that the next step need not fault it in again."""

import ctypes
import os
import sys

# <malloc.h> of glibc: requests are never mapped apart, the heap is never cut, and all threads share one heap.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_SETTINGS = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
_MADV_HUGEPAGE = 14  # <sys/mman.h> of Linux
_RESERVED = 1 / 4  # of the machine's memory: addresses for the heap to grow into


def keep_memory() -> bool:
    """Makes the C library keep freed memory instead of giving it back to the system, in huge pages where it may.

    XLA takes the temporaries of a program anew at every call. glibc gets blocks of this size from the system and gives
    them back when they are freed, so that each call faults in every page again, which costs about a quarter second a
    GB. Matrices that lie in pages of 2 MB instead of 4 KB cost the processor fewer look-ups of addresses. Call this
    before the first large array, in programs that repeat one step. The price is the peak: freed memory of other sizes
    stays with the process too, so resident memory grows by a third or so.

    Returns:
        Whether the settings of the C library were taken; False on systems without glibc, where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl ignores mallopt
        return False
    kept = all(library.mallopt(name, value) == 1 for name, value in _SETTINGS.items())
    if kept:
        _ask_for_huge_pages(library)
    return kept


def _ask_for_huge_pages(library: ctypes.CDLL) -> None:
    """Marks the addresses that the heap will grow into; a system that has no huge pages ignores it.

    A block is taken from the heap and given back untouched: its addresses stay with the heap, no memory is used.
    """
    page, memory = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = int(memory * _RESERVED)
    block = library.malloc(size)
    if block:
        begin = -(-block // page) * page
        library.madvise(begin, (block + size - begin) // page * page, _MADV_HUGEPAGE)
        library.free(block)
