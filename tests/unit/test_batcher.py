"""Requests that wait together run together: order, budget, errors, the end."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from fellray.platform.batcher import Batcher, Served

PATIENCE = 10.0


class Gate:
    """Holds the engine thread, so that what is submitted meanwhile waits."""

    def __init__(self, batcher: Batcher):
        self._entered, self._free = threading.Event(), threading.Event()
        self._held = batcher.call(self._hold)
        assert self._entered.wait(PATIENCE)

    def _hold(self) -> None:
        self._entered.set()
        assert self._free.wait(PATIENCE)

    def open(self) -> None:
        self._free.set()
        self._held.result(PATIENCE)


class Work:
    """A kind of request that remembers what was run together."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.threads: set[str] = set()

    def double(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.threads.add(threading.current_thread().name)
        return [2 * item for item in items]

    def negate(self, items: Sequence[int]) -> list[Any]:
        self.batches.append(list(items))
        return [ValueError(f"bad {item}") if item < 0 else -item for item in items]

    def fail(self, items: Sequence[int]) -> list[int]:
        raise KeyError("all of us")


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    made = Batcher(max_size=10)
    yield made
    made.close()


def results(futures: Sequence["Future[Any]"]) -> list[Any]:
    return [future.result(PATIENCE) for future in futures]


def test_one_request_runs_at_once(batcher: Batcher) -> None:
    assert batcher.submit(Work().double, 4, 1).result(PATIENCE) == 8
    assert batcher.sizes == [1]


def test_what_waits_is_merged_in_order(batcher: Batcher) -> None:
    work, gate = Work(), Gate(batcher)
    futures = [batcher.submit(work.double, i, 2) for i in (3, 1, 2)]
    gate.open()
    assert results(futures) == [6, 2, 4]
    assert work.batches == [[3, 1, 2]]
    assert batcher.sizes == [1, 3]


def test_the_budget_is_kept_and_a_larger_request_goes_alone(batcher: Batcher) -> None:
    work, gate = Work(), Gate(batcher)
    sizes = [6, 4, 1, 25, 10, 5, 5, 1]
    futures = [batcher.submit(work.double, place, size) for place, size in enumerate(sizes)]
    gate.open()
    assert results(futures) == [2 * place for place in range(len(sizes))]
    assert work.batches == [[0, 1], [2, 5, 7], [3], [4], [6]]


def test_the_oldest_is_never_passed_over(batcher: Batcher) -> None:
    """A large request at the head is not starved by small ones that would fit."""
    work, gate = Work(), Gate(batcher)
    futures = [batcher.submit(work.double, size, size) for size in (9, 10, 1, 1, 1)]
    gate.open()
    results(futures)
    assert work.batches == [[9, 1], [10], [1, 1]]


def test_only_the_same_kind_is_merged(batcher: Batcher) -> None:
    work, gate = Work(), Gate(batcher)
    futures = [
        batcher.submit(work.double, 1, 1),
        batcher.submit(work.negate, 2, 1),
        batcher.submit(work.double, 3, 1),
        batcher.call(lambda: "called"),
        batcher.call(lambda: "again"),
    ]
    gate.open()
    assert results(futures) == [2, -2, 6, "called", "again"]
    assert work.batches == [[1, 3], [2]]
    assert batcher.sizes == [1, 2, 1, 1, 1]


def test_another_objects_method_is_another_kind(batcher: Batcher) -> None:
    one, two = Work(), Work()
    gate = Gate(batcher)
    futures = [batcher.submit(w.double, 1, 1) for w in (one, two, one)]
    gate.open()
    results(futures)
    assert (one.batches, two.batches) == ([[1, 1]], [[1]])


def test_an_answer_that_is_an_exception_reaches_its_caller_alone(batcher: Batcher) -> None:
    work, gate = Work(), Gate(batcher)
    futures = [batcher.submit(work.negate, item, 1) for item in (1, -2, 3)]
    gate.open()
    assert futures[0].result(PATIENCE) == -1
    with pytest.raises(ValueError, match="bad -2"):
        futures[1].result(PATIENCE)
    assert futures[2].result(PATIENCE) == -3
    assert work.batches == [[1, -2, 3]]


def test_a_call_that_fails_ends_its_batch_and_nothing_else(batcher: Batcher) -> None:
    work, gate = Work(), Gate(batcher)
    lost = [batcher.submit(work.fail, item, 1) for item in (1, 2)]
    kept = batcher.submit(work.double, 3, 1)
    gate.open()
    for future in lost:
        with pytest.raises(KeyError, match="all of us"):
            future.result(PATIENCE)
    assert kept.result(PATIENCE) == 6


def test_call_passes_arguments_and_exceptions(batcher: Batcher) -> None:
    assert batcher.call(divmod, 7, 2).result(PATIENCE) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        batcher.call(divmod, 7, 0).result(PATIENCE)
    assert batcher.call(int).result(PATIENCE) == 0


def test_a_caller_who_gave_up_takes_nobody_along(batcher: Batcher) -> None:
    """Its answer is nobody's; the others get theirs, and the engine goes on."""
    work, gate = Work(), Gate(batcher)
    first, gone, last = (batcher.submit(work.double, item, 1) for item in (1, 2, 3))
    gone.cancel()
    gate.open()
    assert first.result(PATIENCE) == 2
    assert last.result(2.0) == 6
    assert batcher.submit(work.double, 4, 1).result(2.0) == 8


def test_one_thread_does_the_work(batcher: Batcher) -> None:
    work = Work()
    threads = [
        threading.Thread(
            target=lambda: [batcher.submit(work.double, i, 1).result(PATIENCE) for i in range(50)]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert work.threads == {"engine"}
    assert sum(len(batch) for batch in work.batches) == 200
    assert batcher.call(threading.current_thread).result(PATIENCE).name == "engine"


def test_close_finishes_what_is_queued() -> None:
    batcher, work = Batcher(max_size=1), Work()
    gate = Gate(batcher)
    futures = [batcher.submit(work.double, item, 1) for item in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    gate.open()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8]


def test_every_batch_is_noted_with_its_size_and_times() -> None:
    noted: list[Served] = []
    batcher, work = Batcher(max_size=10, note=noted.append), Work()
    gate = Gate(batcher)
    first = [batcher.submit(work.double, i, size=4) for i in (1, 2)]
    later = batcher.submit(work.fail, 3, size=5)
    time.sleep(0.05)
    gate.open()
    assert results(first) == [2, 4]
    with pytest.raises(KeyError):
        later.result(PATIENCE)
    batcher.close()
    assert [(one.requests, one.size) for one in noted] == [(1, 0), (2, 8), (1, 5)]
    held, merged, failed = noted
    assert held.busy_s >= 0.05
    assert held.waited_s < PATIENCE
    assert merged.waited_s >= 2 * 0.05
    assert failed.waited_s >= 0.05
