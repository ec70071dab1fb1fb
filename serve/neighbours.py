"""The nearest clients of one without adapters of its own, by what each counted.

All learners' counts are read once, in a thread of their own that begins with the service: the first
who has to ask for a mixture does not wait for every shard. It must not know requests or adapters.
"""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from fellray.platform.shards import Dataset
from fellray.serve.ladder import Counts, find_nearest, stack_counts


class Neighbours:
    """Everybody's counts."""

    def __init__(self, data: Dataset, seats: Mapping[str, Sequence[str]]):
        """Args: seats: learner -> the clients whose shards it reads."""
        self._data = data
        self._seats = seats
        self._counting = threading.Lock()
        self._counts: Counts | None = None

    def start(self) -> None:
        """Count in the background."""
        threading.Thread(target=self._count, name="counts", daemon=True).start()

    def find(self, counts_I: np.ndarray, trained: Collection[str]) -> tuple[str, ...]:
        """See `find_nearest`; it may have to wait for the counts.

        Raises:
            FellrayError: a shard is missing or damaged.
        """
        return find_nearest(self._count(), counts_I, trained)

    def _count(self) -> Counts:
        with self._counting:
            if self._counts is None:
                self._counts = stack_counts(self._count_learners())
            return self._counts

    def _count_learners(self) -> Iterator[tuple[str, np.ndarray]]:
        items = len(self._data.titles)
        for learner, clients in sorted(self._seats.items()):
            total = np.zeros(items, np.int64)
            for client in clients:
                total += self._data.shard(client).counts(items)
            yield learner, total
