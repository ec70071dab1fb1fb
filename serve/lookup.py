"""The lookup: a query in, and out comes whose adapters answer it, from what, and what may be told.

Everything here is looked up in the private data of one client; nothing is computed by a model. It
must not know batches, the trunk or HTTP. Shapes: T items that the
run was trained with.
"""

import asyncio
from dataclasses import dataclass

import numpy as np
import torch

from fellray.platform.config import RunConfig
from fellray.platform.shards import Dataset
from fellray.serve.blends import EVERYBODY, name_blend
from fellray.serve.catalogue import Catalogue
from fellray.serve.events import Events
from fellray.serve.histories import NOTHING, Histories
from fellray.serve.items import Items, Reading
from fellray.serve.ladder import Known, Layer, choose_layer
from fellray.serve.neighbours import Neighbours
from fellray.serve.ranking import Choice
from fellray.serve.recent import Recent
from fellray.serve.refusal import Refusal
from fellray.serve.schema import ByHistory, ByUser
from fellray.serve.selection import choose
from fellray.serve.served import Served


@dataclass(frozen=True)
class Asked:
    """A query that was looked up."""

    layer: Layer
    learner: str
    """Whose adapters answer; or a blend."""
    reading: Reading | None
    prior_T: torch.Tensor
    items: Items
    width: int
    """How many of them may be recommended: all, or those the run was trained with."""
    choice: Choice


class Lookup:
    """Histories and counts of the clients who were asked for lately."""

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        catalogue: Catalogue,
        folder: str | None,
        kept: int,
        timeout_s: float,
    ):
        """Args: folder: of events, as `timeout_s` see `Events`. kept: clients whose histories are
        held."""
        self.seats = config.method.seat(data.clients)
        """Learner -> the clients whose shards it reads."""
        self.learner = {c: learner for learner, own in self.seats.items() for c in own}
        """Client -> its learner."""
        self._data = data
        self._catalogue = catalogue
        anybodys = data.popularity / len(data.clients)
        self._anybodys_T = torch.from_numpy(anybodys).float().log1p()
        self._histories: Recent[Histories] = Recent(kept)
        self._neighbours = Neighbours(data, self.seats)
        self.events = Events(folder, data, catalogue, self.read, kept, timeout_s)
        """What users met since the data were prepared."""

    def num_users(self, client: str) -> int:
        """How many users a client of the run has."""
        return int(self._data.manifest["clients"][client]["users"])

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
        later = NOTHING
        if own and isinstance(query, ByUser) and query.as_of == "now":
            later = await self.events.later(query.client, query.user_id)
        items = self._catalogue.items  # not before: what was met may have come meanwhile
        width = len(items)
        if isinstance(query, ByUser):
            found = own.find(query.user_id, query.as_of, later) if own else None
            if found is None:
                raise Refusal(404, "unknown_user", "the client has no such user", "user_id")
            history, seen = found
            reading = items.read_items(history) if len(history) else None
            width = width if query.as_of == "now" else items.trained
        else:
            reading = items.read(query.history) if query.history else None
            seen = reading.met if reading else np.empty(0, np.int64)
        known = Known(learner, served.trained, reading is not None)
        layer = choose_layer(known, ())
        adapters = learner or EVERYBODY
        if layer == "mean":
            counts_I = own.counts_I if own else np.bincount(seen, minlength=len(items))
            nearest = await self.find_nearest(counts_I, served)
            layer = choose_layer(known, nearest)
            adapters = name_blend(nearest) if nearest else EVERYBODY
        prior_T = own.prior_I if own and own.counts_I.any() else self._anybodys_T
        choice = choose(items, query.k, query.filters, query.candidates, seen)
        return Asked(layer, adapters, reading, prior_T, items, width, choice)

    async def find_nearest(self, counts_I: np.ndarray, served: Served) -> tuple[str, ...]:
        """Trained learners who counted alike, by name."""
        return await asyncio.to_thread(self._neighbours.find, counts_I, served.trained)

    async def read(self, client: str) -> Histories:
        """Of a client of the run; from disk where it was not asked for lately.

        Raises:
            FellrayError: the shard is missing or damaged.
        """
        if held := self._histories.find(client):
            return held
        shard = await asyncio.to_thread(self._data.shard, client)
        return self._histories.keep(client, Histories(shard, self._catalogue.items.trained))
