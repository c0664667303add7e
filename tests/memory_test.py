import subprocess
import sys

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


def faults(*arguments: str) -> tuple[bool, int]:
    answer = subprocess.run([sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True, check=True)
    kept, count = map(int, answer.stdout.split())
    return bool(kept), count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_kept_memory_may_lie_in_huge_pages():
    with open("/proc/self/smaps") as file:
        if "VmFlags:" not in file.read():
            pytest.skip("a kernel that does not say what was advised")
    answer = subprocess.run([sys.executable, "-c", ADVICE], capture_output=True, text=True, check=True)
    assert "hg" in answer.stdout.split()


def test_systems_without_glibc_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_memory() is False
