"""Memory of the process on a CPU: keeping what was freed, so that the next step need not fault it in or look for it.

XLA takes the temporaries of a program anew at every call, and the workspace of every product too: a train step of four
layers on two devices asks the C library for two blocks of 256 MB and for twelve thousand of 64 KB to 1.6 MB. The
allocator of glibc is made for neither. Three things help, none of which does more than take blocks and give them back:

- settings, so that blocks stay with the process instead of being faulted in again;
- a room of large free blocks that nothing lies between: an aligned block of n bytes only fits into n + 96, so that
  where something small has come to lie at its end, the same block must go elsewhere the next time, and the heap grows;
- what compiling leaves, ten thousands of free pieces of all sizes, is set aside until the next large program is
  compiled: a list of free pieces of similar size is searched one after the other, each a miss of the cache.
"""

import ctypes
import os
import sys
import threading
from typing import Any

import jax

# <malloc.h> of glibc: requests are never mapped apart, the heap is never cut, and all threads share one heap.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_SETTINGS = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
_MADV_HUGEPAGE = 14  # <sys/mman.h> of Linux
_MEGABYTE = 2**20
_SMALL_BLOCKS = {2 * _MEGABYTE: 32, 8 * _MEGABYTE: 8, 64 * _MEGABYTE: 4}  # of the room, bytes: number
_LARGE_BLOCKS = 8  # of the room, a quarter of the machine's memory together; addresses, used when they are written
_BETWEEN = 4096  # bytes that stay taken between blocks of the room
# Bytes of free pieces that are set aside. Smaller ones have a list for each size, larger ones are few.
_SMALL_PIECE, _LARGE_PIECE = 1200, _MEGABYTE
_LOWERED, _COMPILED = "/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration"
_LARGE_PROGRAM = 0.05  # seconds of lowering; to set pieces aside takes as long


def keep_memory() -> bool:
    """Makes the C library keep freed memory, in huge pages where it may, and find it quickly.

    glibc gets large blocks from the system and gives them back when they are freed, so that each call of a program
    faults in every page again, which costs about a quarter second a GB. Matrices that lie in pages of 2 MB instead of
    4 KB cost the processor fewer look-ups of addresses. Call this before the first large array, in programs that
    repeat one step. The price is the peak: freed memory of other sizes stays with the process too, and what compiling
    a large program left is not used again before the next one is compiled, so resident memory grows by a third or so.
    Allocators such as jemalloc and tcmalloc (by ``LD_PRELOAD``) need none of it.

    Returns:
        Whether the C library keeps memory; False on systems without glibc or with another allocator in its place, where
        nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl ignores mallopt
        return False
    own = ctypes.CDLL("libc.so.6").malloc
    if ctypes.cast(own, ctypes.c_void_p).value != ctypes.cast(library.malloc, ctypes.c_void_p).value:
        return False
    kept = all(library.mallopt(name, value) == 1 for name, value in _SETTINGS.items())
    if kept and not _heaps:
        _heaps.append(_Heap(library))
        jax.monitoring.register_event_duration_secs_listener(_heaps[0].on_event)
    return kept


class _Heap:
    """The room, the pieces that are set aside, and when: the room is closed while a large program is compiled.

    Attributes:
        begin: first address of the room.
        end: first address after it.
        closed: blocks of the room that are held.
        pieces: what is set aside.
    """

    def __init__(self, library: Any) -> None:
        self.library, self.lock = library, threading.Lock()
        library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        self.room = page * pages // 4
        self.begin = self.end = 0
        self.closed: list[int] = []
        self.pieces: list[int] = []
        self.compiling = False
        self._reserve(page)

    def _reserve(self, page: int) -> None:
        """Marks the addresses that the heap will grow into, and takes the room from their beginning.

        A system that has no huge pages ignores the mark. No memory is used before it is written.
        """
        size = 2 * self.room  # and as much for what lies beside it
        region = self.library.malloc(size)
        if region is None:
            return
        begin = -(-region // page) * page
        self.library.madvise(begin, (region + size - begin) // page * page, _MADV_HUGEPAGE)
        self.library.free(region)
        for size, number in (*_SMALL_BLOCKS.items(), (self.room // _LARGE_BLOCKS, _LARGE_BLOCKS)):
            for _ in range(number):
                block, between = self._beyond(region, size), self._beyond(region, _BETWEEN)
                if block is None or between is None:
                    return
                self.begin, self.end = self.begin or block, between
                self.closed.append(block)

    def _beyond(self, begin: int, size: int) -> int | None:
        """A block that lies after an address; what fits before it is taken and given back."""
        before = []
        block = self.library.malloc(size)
        while block is not None and block < begin:
            before.append(block)
            block = self.library.malloc(size)
        self._free(before)
        return block

    def on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        """Listens to the compiler: gives it back what is set aside, and sets aside what it leaves."""
        with self.lock:
            if event == _LOWERED and duration_secs >= _LARGE_PROGRAM and self.begin:
                self._free(self.pieces)
                taken = self._take(self.room // _LARGE_BLOCKS, _LARGE_PIECE)
                self.closed += [block for block in taken if self.begin <= block < self.end]
                self._free([block for block in taken if not self.begin <= block < self.end])
                self.compiling = True
            elif event == _COMPILED and self.compiling:
                large = self._take(self.room // _LARGE_BLOCKS, _LARGE_PIECE)
                self.pieces += self._take(_LARGE_PIECE, _SMALL_PIECE)
                self._free(large)
                self._free(self.closed)
                self.compiling = False

    def _take(self, size: int, least: int) -> list[int]:
        """Takes all free pieces of so many bytes, large ones first; glibc picks the smallest that fits."""
        end, taken = self.library.malloc(2 * self.room), []  # fits nowhere but at the end of the heap
        while end is not None and size >= least:
            block = self.library.malloc(size)
            if block is None or block >= end:
                self.library.free(block)
                size = size * 15 // 16
            else:
                taken.append(block)
        self.library.free(end)
        return taken

    def _free(self, blocks: list[int]) -> None:
        for block in blocks:
            self.library.free(block)
        blocks.clear()


_heaps: list[_Heap] = []  # none before keep_memory was called
