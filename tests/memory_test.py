import ctypes
import subprocess
import sys
import types

import jax
import pytest

from jaxrl_suite import memory

# Pages faulted in by a second block of 200 MB after the first was freed; a process of its own, as the setting stays.
FAULTS = """
import resource, sys
from jaxrl_suite.memory import keep_memory
kept = "keep" in sys.argv and keep_memory()
bytearray(200_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray(200_000_000)
for i in range(0, len(block), 4096): block[i] = 1
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")


def output(program: str, *arguments: str) -> str:
    """What a process of its own prints."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    ).stdout


def faults(*arguments: str) -> tuple[bool, int]:
    kept, count = map(int, output(FAULTS, *arguments).split())
    return bool(kept), count


@on_linux
def test_kept_memory_is_not_faulted_in_again():
    kept, few = faults("keep")
    _, many = faults()
    assert kept and few * 10 < many


# Flags of the addresses in the middle of a block of 200 MB: "hg" is the advice to use huge pages.
ADVICE = """
import ctypes
from jaxrl_suite.memory import keep_memory
keep_memory()
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
address, inside = malloc(200_000_000) + 100_000_000, False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first and ":" not in first:
        begin, end = (int(part, 16) for part in first.split("-"))
        inside = begin <= address < end
    elif inside and first == "VmFlags:":
        print(line)
"""


@on_linux
def test_kept_memory_may_lie_in_huge_pages():
    with open("/proc/self/smaps") as file:
        if "VmFlags:" not in file.read():
            pytest.skip("a kernel that does not say what was advised")
    assert "hg" in output(ADVICE).split()


# Whether a block of 50,000 bytes comes from among the pieces of that size, before, between and after compilations.
ASIDE = """
from jaxrl_suite import memory
memory.keep_memory()
heap = memory._heaps[0]
malloc, free = heap.library.malloc, heap.library.free
blocks = [malloc(50_000) for _ in range(1000)]
pieces = set(blocks[::2])
for block in pieces:
    free(block)
def fits():
    block = malloc(50_000)
    free(block)
    return block in pieces
def inside(block):
    return heap.begin <= block < heap.end
print(fits())
heap.on_event(memory._LOWERED, 0.01), heap.on_event(memory._COMPILED, 0.1)
print(fits())
heap.on_event(memory._LOWERED, 1.0)
print(fits(), inside(malloc(2**22)))
heap.on_event(memory._COMPILED, 1.0)
print(fits(), inside(malloc(50_000)), inside(malloc(2**22)))
heap.on_event(memory._LOWERED, 1.0)
print(fits(), inside(malloc(2**22)))
"""


@on_linux
def test_pieces_are_set_aside_between_compilations():
    small_program, compiling, running, again = "True", ["True", "False"], ["False", "True", "True"], ["True", "False"]
    assert output(ASIDE).split() == ["True", small_program, *compiling, *running, *again]


def test_the_compiler_says_what_the_heap_listens_to():
    heard = set()

    def listener(event, duration_secs, **_):
        heard.add(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    jax.jit(lambda x: x + 1)(jax.numpy.ones(3))
    jax.monitoring.unregister_event_duration_listener(listener)
    assert {memory._LOWERED, memory._COMPILED} <= heard


def test_systems_without_glibc_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_memory() is False


@on_linux
def test_another_allocator_is_left_as_it_is(monkeypatch):
    own = ctypes.CDLL("libc.so.6")
    other = types.SimpleNamespace(malloc=own.calloc, gnu_get_libc_version=own.gnu_get_libc_version)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: other if name is None else own)
    assert memory.keep_memory() is False
