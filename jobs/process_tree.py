"""What a process and all that it started weigh and use together. Linux only; it knows no job.

PSS (proportional set size): a page that several processes share counts once, in parts, so that the
sum over a tree is memory and not a multiple of it.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


def list_tree(root: int) -> list[int]:
    """A process and its descendants that live now."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int(_read_stat(int(entry.name))[1])
                children.setdefault(parent, []).append(int(entry.name))
    tree = [root]
    for process in tree:
        tree += children.get(process, [])
    return tree


def read_pss(process: int) -> int:
    """Bytes; 0 where the process is gone."""
    try:
        lines = (_PROC / str(process) / "smaps_rollup").read_text("ascii").splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def read_cpu(process: int) -> float | None:
    """Seconds of CPU that it has used, all threads, without its children's; None: it is gone."""
    try:
        fields = _read_stat(process)
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Watch:
    """Looks at a process tree every so often, until it is left."""

    def __init__(self, root: int, every_s: float = 1.0):
        self._root = root
        self._every_s = every_s
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.peak_bytes = 0
        """Highest PSS of the whole tree that was seen."""
        self.processes = 0
        """Most processes that were seen at once."""
        self._cpu: dict[int, float] = {}
        self._seen: list[tuple[float, float]] = []

    def cpu_between(self, start: float, end: float) -> float:
        """Seconds of CPU that the tree used between two readings of `time.perf_counter`.

        What another process's load does to the clock it does not do to this, or little.
        """
        times, used = zip(*self._seen, strict=True)
        return float(np.interp(end, times, used) - np.interp(start, times, used))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            tree = list_tree(self._root)
            self.peak_bytes = max(self.peak_bytes, sum(map(read_pss, tree)))
            self.processes = max(self.processes, len(tree))
            now = {process: read_cpu(process) for process in tree}
            self._cpu |= {process: used for process, used in now.items() if used is not None}
            self._seen.append((time.perf_counter(), sum(self._cpu.values())))
            if self._left.wait(self._every_s):
                return


def _read_stat(process: int) -> list[str]:
    """The fields behind the command's name, which may hold anything."""
    stat = (_PROC / str(process) / "stat").read_text("ascii", errors="replace")
    return stat.rpartition(")")[2].split()
