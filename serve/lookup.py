"""The lookup: a query in, and out comes whose adapters answer it, from what, and what may be told.

Everything here is looked up in the private data of one client; nothing is computed by a model. It
must not know batches, the trunk or HTTP. Shapes: I items.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fellray.platform.config import RunConfig
from fellray.platform.shards import Dataset
from fellray.serve.blends import EVERYBODY, name_blend
from fellray.serve.histories import Histories
from fellray.serve.items import Items, Reading
from fellray.serve.ladder import Known, Layer, choose_layer
from fellray.serve.neighbours import Neighbours
from fellray.serve.ranking import Choice
from fellray.serve.refusal import Refusal
from fellray.serve.schema import ByHistory, ByUser, Filters
from fellray.serve.served import Served


@dataclass(frozen=True)
class Asked:
    """A query that was looked up."""

    layer: Layer
    learner: str
    """Whose adapters answer; or a blend."""
    reading: Reading | None
    prior_I: torch.Tensor
    choice: Choice


class Lookup:
    """Histories and counts of the clients who were asked for lately."""

    def __init__(self, config: RunConfig, data: Dataset, items: Items, kept: int):
        """Args: kept: clients whose histories are held."""
        self.seats = config.method.seat(data.clients)
        """Learner -> the clients whose shards it reads."""
        self.learner = {c: learner for learner, own in self.seats.items() for c in own}
        """Client -> its learner."""
        self._data = data
        self._items = items
        self._kept = kept
        anybodys = data.popularity / len(data.clients)
        self._anybodys_I = torch.from_numpy(anybodys).float().log1p()
        self._histories: OrderedDict[str, Histories] = OrderedDict()
        """Longest unused first."""
        self._neighbours = Neighbours(data, self.seats)

    def start(self, served: Served) -> None:
        """Begin to count in the background, if a client of the run may need its neighbours."""
        if served.trained and len(served.trained) < len(self.seats):
            self._neighbours.start()

    @property
    def held(self) -> int:
        """Clients whose histories are in memory."""
        return len(self._histories)

    async def look_up(self, query: ByUser | ByHistory, served: Served) -> Asked:
        """Raises:
        Refusal: something that is named is not there.
        FellrayError: a shard is missing or damaged.
        """
        learner = self.learner.get(query.client)
        own = await self.read(query.client) if learner else None
        if isinstance(query, ByUser):
            found = own.find(query.user_id, query.as_of) if own else None
            if found is None:
                raise Refusal(404, "unknown_user", "the client has no such user", "user_id")
            history, seen = found
            reading = self._items.read_items(history) if len(history) else None
        else:
            reading = self._items.read(query.history) if query.history else None
            seen = reading.met if reading else np.empty(0, np.int64)
        known = Known(learner, served.trained, reading is not None)
        layer = choose_layer(known, ())
        adapters = learner or EVERYBODY
        if layer == "mean":
            counts_I = own.counts_I if own else np.bincount(seen, minlength=len(self._items))
            nearest = await self.find_nearest(counts_I, served)
            layer = choose_layer(known, nearest)
            adapters = name_blend(nearest) if nearest else EVERYBODY
        prior_I = own.prior_I if own and own.counts_I.any() else self._anybodys_I
        choice = self._choose(query.k, query.filters, query.candidates, seen)
        return Asked(layer, adapters, reading, prior_I, choice)

    async def find_nearest(self, counts_I: np.ndarray, served: Served) -> tuple[str, ...]:
        """Trained learners who counted alike, by name."""
        return await asyncio.to_thread(self._neighbours.find, counts_I, served.trained)

    async def read(self, client: str) -> Histories:
        """Of a client of the run; from disk where it was not asked for lately.

        Raises:
            FellrayError: the shard is missing or damaged.
        """
        if client not in self._histories:
            shard = await asyncio.to_thread(self._data.shard, client)
            self._histories[client] = Histories(shard, len(self._items))
            if len(self._histories) > self._kept:
                self._histories.popitem(last=False)
        self._histories.move_to_end(client)
        return self._histories[client]

    def _choose(
        self, k: int, filters: Filters, candidates: Sequence[int] | None, seen: np.ndarray
    ) -> Choice:
        only = [
            np.unique(self._items.find(ids, name))
            for name, ids in (("candidates", candidates), ("filters.allow", filters.allow))
            if ids is not None
        ]
        if filters.categories is not None:
            only.append(self._items.in_categories(filters.categories, "filters.categories"))
        without = [seen] if filters.seen else []
        if filters.deny is not None:
            without.append(self._items.find(filters.deny, "filters.deny"))
        kept = only[0] if only else None
        for more in only[1:]:
            assert kept is not None
            kept = np.intersect1d(kept, more)
        return Choice(min(k, len(self._items)), kept, np.concatenate(without) if without else None)
