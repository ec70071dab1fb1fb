"""Freed memory stays with a process or goes, each in one of its own: settings cannot be taken
back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import ctypes, resource, sys, numpy
from fellray.platform.allocator import keep_freed_memory
assert not ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages: what is counted is small ones
if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    numpy.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

HOLES = """
import numpy
from fellray.platform.allocator import give_back_freed_memory

def weigh():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

blocks = [numpy.ones(2**13) for _ in range(2000)]
del blocks[::2]
before = weigh()
assert give_back_freed_memory()
print((before - weigh()) * 4096)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own setting")
def test_holes_between_blocks_are_given_back() -> None:
    assert run(HOLES) > 0.8 * 1000 * 2**16


def run(code: str, *arguments: str) -> int:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own setting")
def test_the_same_pages_are_not_asked_for_again() -> None:
    faults = {arm: run(CODE, arm) for arm in ("kept", "given back")}
    assert faults["kept"] < 0.3 * faults["given back"]
