"""Actors that are weighed: the client actor and the server of every run, in processes that tell
what memory they take. They know nothing of what follows from it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fellray.actors.server import Server
from fellray.jobs.measured import STATUS, ClockedClient
from fellray.platform.messages import Update
from fellray.platform.metrics import Score

CUDA_BYTES = 600 * 2**20
"""Of a process with a GPU, what torch's allocator does not count: CUDA's own. Not measured."""


@dataclass(frozen=True)
class Weight:
    """What a process has used since it was last asked."""

    process: int
    own_bytes: int
    """Peak of the memory that is its alone."""
    shared_bytes: int
    """Code from files, which processes of a node share."""
    gpu_bytes: int
    """Peak on the GPU."""
    gpu_has: int
    """Memory of that GPU."""


class Scale:
    """A process that says what it weighs. For actors to inherit."""

    def weigh(self) -> Weight:
        """The peak since the last call, which begins anew."""
        own, shared = read_weight(STATUS.read_text(encoding="ascii"))
        with suppress(OSError):  # not every container lets it; then the peak is that of its life
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        peak = has = 0
        if torch.cuda.is_initialized():  # seeing a GPU is not using it, and asking would begin to
            peak = torch.cuda.max_memory_reserved() + CUDA_BYTES
            has = torch.cuda.mem_get_info()[1]
            torch.cuda.reset_peak_memory_stats()
        return Weight(os.getpid(), own, shared, peak, has)


class WeighedServer(Scale, Server):
    """The server of every run."""


class WeighedClient(Scale, ClockedClient):
    """The client actor of every run, with a clock at the cut."""

    _here = _served = 0.0

    def fit(self, *args: Any) -> Update:
        """See `Client`."""
        with self._clock():
            return super().fit(*args)

    def evaluate(self, *args: Any) -> dict[str, Score]:
        """See `Client`."""
        with self._clock():
            return super().evaluate(*args)

    def clocked(self) -> tuple[float, float]:
        """Seconds of the last call: the actor's own, and waiting for the server."""
        return self._here, self._served

    @contextmanager
    def _clock(self) -> Iterator[None]:
        began, waited = time.perf_counter(), self._timed.waiting
        yield
        self._served = self._timed.waiting - waited
        self._here = time.perf_counter() - began - self._served


def read_weight(status: str) -> tuple[int, int]:
    """Bytes of a process's own at its peak, and of files that it shares, from the text of
    /proc/<pid>/status. What it maps of Ray's object store is neither."""
    rows = (line.split() for line in status.splitlines())
    sizes = {row[0]: int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}
    shared = sizes["RssFile:"]
    return sizes["VmHWM:"] - shared - sizes["RssShmem:"], shared
