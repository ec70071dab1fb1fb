"""The ferry: takes whoever waits across the trunk together, and brings each its ranking.

Questions gather in the event loop while the engine thread is busy with those before them, so a
batch costs one message to that thread and one to the trunk, however many are in it. Nobody is
waited for. This file must not know who asks, Ray or HTTP.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fellray.platform.batcher import Batcher
from fellray.platform.messages import Activation
from fellray.serve.ends import Crossing, Ends, Question
from fellray.serve.ranking import Ranking


class Far(Protocol):
    """The far side of the cut: `serve.trunk.Trunk`, here or behind a handle."""

    async def forward(self, activation: Activation) -> np.ndarray:
        """Hidden states at the upper cut [L, d]."""
        ...

    async def ready(self) -> bool:
        """True, once it can be asked."""
        ...


class Ferry:
    """One engine thread for the private ends, and a trunk somewhere else."""

    def __init__(self, make: Callable[[], Ends], trunk: Far, rows: int):
        """Args: make: called on the engine thread: thread counts belong to a thread. rows: most
        questions in a batch."""
        self._batcher = Batcher(rows)
        self._trunk = trunk
        self._rows = rows
        self._waiting: list[tuple[Question, asyncio.Future[Ranking]]] = []
        self._loading: asyncio.Task[None] | None = None
        self._under_way: set[asyncio.Task[None]] = set()
        self._crossings = 0
        self._ends = self._batcher.call(make).result()

    async def rank(self, question: Question) -> Ranking:
        """The answer to one question.

        Raises:
            FellrayError: a page of its round is gone or damaged, or no trunk can be reached.
        """
        place: asyncio.Future[Ranking] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, place))
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load())
        return await place

    def totals(self) -> dict[str, int]:
        """What it did so far: `loaded` of the adapters `asked` for were not in memory."""
        return {
            "adapters_asked": self._ends.asked,
            "adapters_loaded": self._ends.loaded,
            "crossings": self._crossings,
        }

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._batcher.close()

    async def _load(self) -> None:
        while self._waiting:
            few, self._waiting = self._waiting[: self._rows], self._waiting[self._rows :]
            few = [(question, place) for question, place in few if not place.done()]
            if not few:  # all of them gave up
                continue
            questions = [question for question, _ in few]
            places = [place for _, place in few]
            try:
                risen = await asyncio.wrap_future(self._batcher.call(self._ends.rise, questions))
            except Exception as error:  # handed to those whom it concerns
                _refuse(places, error)
                continue
            aboard: dict[Crossing, dict[int, asyncio.Future[Ranking]]] = {}
            for place, found in zip(places, risen, strict=True):
                if isinstance(found, Exception):
                    _refuse([place], found)
                else:
                    crossing, at = found
                    aboard.setdefault(crossing, {})[at] = place
            for crossing, of_crossing in aboard.items():
                # whoever gives up does not end the others' crossing
                task = asyncio.create_task(self._cross(crossing, of_crossing))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def _cross(
        self, crossing: Crossing, places: dict[int, "asyncio.Future[Ranking]"]
    ) -> None:
        self._crossings += 1
        try:
            output = await self._trunk.forward(crossing.activation)
            rankings: Sequence[Ranking] = await asyncio.wrap_future(
                self._batcher.call(self._ends.finish, crossing, output)
            )
        except Exception as error:
            _refuse(list(places.values()), error)
            return
        for at, place in places.items():
            if not place.done():
                place.set_result(rankings[at])


def _refuse(places: Sequence["asyncio.Future[Ranking]"], error: Exception) -> None:
    for place in places:
        if not place.done():
            place.set_exception(error)
