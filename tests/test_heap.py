"""Freed memory is kept inside the block, and given back behind it; without glibc nothing happens."""

import ctypes
import platform
import resource
import subprocess
import sys

import pytest

from cat_plugin import heap

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# 64 buffers of 8 MiB, each written and freed: how many pages the system had to clear
COUNTED = """
import contextlib, ctypes, resource
from cat_plugin.heap import freed_memory_kept

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallopt(-3, 1 << 20)  # as in a process that has not freed anything large yet

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(64):
        place = libc.malloc(8 << 20)
        ctypes.memset(place, 1, 8 << 20)
        libc.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

outside = pages()
with freed_memory_kept():
    with freed_memory_kept():
        pages()
    inside = pages()  # an inner block that ends changes nothing
    held = resident()
print(outside, inside, held - resident())
"""


@glibc
def test_pages_are_cleared_once_inside_the_block_and_given_back_behind_it() -> None:
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True)
    outside, inside, given_back = (int(number) for number in done.stdout.split())
    whole = (8 << 20) // resource.getpagesize()
    assert outside > 60 * whole
    assert inside < whole
    assert given_back > 6 << 20


# 64 buffers of 8 MiB with small ones between that stay: what the process holds of them once they are freed and some time has passed
HOLES = """
import ctypes, time
from cat_plugin import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) << 10

def hold(size):
    place = libc.malloc(size)
    ctypes.memset(place, 1, size)
    return place

heap._LATELY = 3
with heap.freed_memory_kept():
    before = held()
    large = [(hold(8 << 20), hold(1 << 16))[0] for _ in range(64)]
    most = held() - before
    for place in large:
        libc.free(place)
    kept = held() - before
    until = time.monotonic() + 30
    while held() - before > kept // 2 and time.monotonic() < until:
        time.sleep(0.05)
    print(most, kept, held() - before)
"""


@glibc
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc before 2.33")
def test_what_is_held_in_vain_is_given_back_inside_the_block() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    most, kept, left = (int(number) for number in done.stdout.split())
    assert most > 512 << 20 < kept + (16 << 20)
    assert left < 64 << 20


@glibc
def test_the_settings_come_and_go_once_however_blocks_are_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, int], ...]] = []
    monkeypatch.setattr(heap, "_set", lambda _, values: seen.append(values))
    with pytest.raises(KeyError), heap.freed_memory_kept(), heap.freed_memory_kept():
        raise KeyError
    assert seen == [heap._KEPT, heap._AS_BEFORE]
    with heap.freed_memory_kept():
        assert len(seen) == 3


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap, "_set", lambda *_: pytest.fail("mallopt was called"))
    with heap.freed_memory_kept():
        pass
