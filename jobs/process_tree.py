"""What a process and all that it started weigh together. Linux only; it knows no job.

PSS (proportional set size): a page that several processes share counts once, in parts, so that the
sum over a tree is memory and not a multiple of it.
"""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

_PROC = Path("/proc")


def list_tree(root: int) -> list[int]:
    """A process and its descendants that live now."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                stat = (entry / "stat").read_text("ascii", errors="replace")
                parent = int(stat.rpartition(")")[2].split()[1])
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

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._left.wait(self._every_s):
            tree = list_tree(self._root)
            self.peak_bytes = max(self.peak_bytes, sum(map(read_pss, tree)))
            self.processes = max(self.processes, len(tree))
