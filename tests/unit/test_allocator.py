"""Freed memory stays with the process, in one of its own: the setting cannot be taken back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import resource, sys, numpy
from fellray.platform.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    numpy.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own setting")
def test_the_same_pages_are_not_asked_for_again() -> None:
    faults = {}
    for arm in ("kept", "given back"):
        done = subprocess.run(
            [sys.executable, "-c", CODE, arm],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        faults[arm] = int(done.stdout)
    assert faults["kept"] < 0.3 * faults["given back"]
