"""Merges whatever waits: requests of one kind that are there at the same moment share one call.

Nobody is waited for. One thread does the work, so what it calls need not be thread-safe. It knows
nothing of what the requests mean.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

RECORDED = 2**16
"""Batches that are remembered."""

Run = Callable[[Sequence[Any]], Sequence[Any]]
"""Requests in, one answer for each out; an answer that is an exception is raised at its caller."""


@dataclass(frozen=True)
class _Waiting:
    run: Run
    item: Any
    size: int
    answer: "Future[Any]"
    since: float


@dataclass(frozen=True)
class Served:
    """A batch that has its answers."""

    requests: int
    size: int
    """Of all requests together."""
    waited_s: float
    """Seconds between asking and the batch's beginning, summed over its requests."""
    busy_s: float
    """Seconds of work."""


def _ignore(served: Served) -> None:
    """Nobody counts."""


class Batcher:
    """A queue in front of one engine thread."""

    def __init__(self, max_size: int, note: Callable[[Served], None] = _ignore):
        """Args:
        max_size: sizes in one batch add up to at most this; one request may exceed it.
        note: hears of every batch, on the engine thread, before its callers have their answers.
        """
        self._max_size = max_size
        self._note = note
        self._queue: deque[_Waiting] = deque()
        self._filled = threading.Condition()
        self._open = True
        self.sizes: list[int] = []
        """Requests in each of the last batches, for the record."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, run: Run, item: Any, size: int) -> "Future[Any]":
        """Ask for `run([..., item, ...])`; requests with the same `run` may be merged."""
        waiting = _Waiting(run, item, size, Future(), time.monotonic())
        with self._filled:
            self._queue.append(waiting)
            self._filled.notify()
        return waiting.answer

    def call(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """Ask for `function(*args)` in its turn, merged with nothing."""
        return self.submit(lambda _: [function(*args)], None, 0)

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        with self._filled:
            self._open = False
            self._filled.notify()
        self._thread.join()

    def _work(self) -> None:
        while taken := self._take():
            # whoever gave up in the meantime is left out
            batch = [w for w in taken if w.answer.set_running_or_notify_cancel()]
            if not batch:
                continue
            self.sizes.append(len(batch))
            del self.sizes[:-RECORDED]
            began = time.monotonic()
            try:
                answers = batch[0].run([waiting.item for waiting in batch])
            except Exception as error:  # handed to the callers, whose calls it ends
                answers = [error] * len(batch)
            size, waited = sum(w.size for w in batch), sum(began - w.since for w in batch)
            self._note(Served(len(batch), size, waited, time.monotonic() - began))
            for waiting, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)

    def _take(self) -> list[_Waiting]:
        """The oldest request and every other that may share its call, in order of arrival."""
        with self._filled:
            while not self._queue and self._open:
                self._filled.wait()
            if not self._queue:
                return []
            batch: list[_Waiting] = []
            left: list[_Waiting] = []
            size = 0
            for waiting in self._queue:
                fits = not batch or size + waiting.size <= self._max_size
                if fits and (not batch or waiting.run == batch[0].run):
                    batch.append(waiting)
                    size += waiting.size
                else:
                    left.append(waiting)
            self._queue = deque(left)
            return batch
