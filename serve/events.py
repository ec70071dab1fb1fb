"""New interactions over the API: checked, stored once, and part of their users' next request.

Every replica writes to the same files, one for each client, and looks at them before it answers, so
what one replica has stored counts for all at once. It must not know Ray, nor how a file is written.
"""

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from fellray.platform.batcher import Batcher
from fellray.platform.errors import FellrayError
from fellray.platform.events import Event, EventLog
from fellray.platform.intake import Conflict, Stored, add_events
from fellray.platform.shards import Dataset
from fellray.serve.histories import NOTHING, Histories
from fellray.serve.refusal import Refusal
from fellray.serve.schema import MOST_EVENTS, NewEvent, Receipt

AHEAD_S = 300
"""How far a timestamp may lie in the future: clocks differ."""
_LITTLE = 2**16
"""Bytes that are read at once; more are read in a thread."""
_log = logging.getLogger("fellray.serve")


class Events:
    """The events of a run's clients, as this replica knows them."""

    def __init__(
        self,
        folder: str | None,
        data: Dataset,
        histories: Callable[[str], Awaitable[Histories]],
        kept: int,
    ):
        """Args: folder: None: there is none, and nothing is stored. histories: of a client of the
        run. kept: clients whose events are held in memory."""
        self._folder = folder
        self._taken: dict[str, dict[str, Any]] = data.manifest.get("events", {})
        self._clients = frozenset(data.clients)
        self._item_ids = data.item_ids
        self._histories = histories
        self._kept = kept
        self._logs: OrderedDict[str, EventLog] = OrderedDict()
        """Longest unused first."""
        self._holding = threading.Lock()
        self._batcher = Batcher(MOST_EVENTS)

    async def add(self, events: Sequence[NewEvent]) -> Receipt:
        """Store them all, or none.

        Raises:
            Refusal: one names what is not there, or has another one's id; or the disk refuses.
        """
        if self._folder is None:
            why = "the run lies on no disk; the operator can start the service with events=FOLDER"
            raise Refusal(503, "no_events", why)
        await self._check(events)
        asked = [(e.client, Event(e.event_id, e.user_id, e.item_id, e.timestamp)) for e in events]
        future = self._batcher.submit(self._store, asked, len(asked))
        answer: Stored | Conflict = await asyncio.wrap_future(future)
        if isinstance(answer, Conflict):
            why = "another event of this client has the id"
            raise Refusal(409, "other_event", why, f"events.{answer.place}.event_id")
        return Receipt(stored=answer.new, known=answer.known)

    async def later(self, client: str, user_id: int) -> np.ndarray:
        """Indices of the items that a user has met since the data were prepared, oldest first.

        Raises:
            Refusal: the client's events cannot be read.
        """
        if self._folder is None:
            return NOTHING
        try:
            log = self._log(client)
            if log.behind() > _LITTLE:
                await asyncio.to_thread(log.catch_up)
            met = log.later(user_id)
        except FellrayError as error:
            raise _unreadable(error) from None
        return np.searchsorted(self._item_ids, met) if met else NOTHING

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._batcher.close()

    async def _check(self, events: Sequence[NewEvent]) -> None:
        latest = time.time() + AHEAD_S
        for place, event in enumerate(events):
            if event.client not in self._clients:
                where = f"events.{place}.client"
                raise Refusal(404, "unknown_client", "the run has no such client", where)
            if event.timestamp > latest:
                why = "lies in the future; it is in seconds since 1970"
                raise Refusal(422, "bad_timestamp", why, f"events.{place}.timestamp")
        strange = ~np.isin(np.array([event.item_id for event in events]), self._item_ids)
        if strange.any():
            # one that came after the training is in no prepared data, so it could not be trained on
            where = f"events.{int(strange.argmax())}.item_id"
            raise Refusal(404, "unknown_item", "the training data have no such item", where)
        places_of: dict[str, list[int]] = {}
        for place, event in enumerate(events):
            places_of.setdefault(event.client, []).append(place)
        for client, places in places_of.items():
            users = np.array([events[place].user_id for place in places], np.int64)
            strange = (await self._histories(client)).find_strangers(users)
            if len(strange):
                where = f"events.{places[strange[0]]}.user_id"
                raise Refusal(404, "unknown_user", "the client has no such user", where)

    def _store(
        self, requests: Sequence[Sequence[tuple[str, Event]]]
    ) -> Sequence[Stored | Conflict | Refusal]:
        """Of whoever waited together: one wait for the disk. Where that fails, each on its own."""
        clients = {client for request in requests for client, _ in request}
        try:
            return add_events(requests, {client: self._log(client) for client in clients})
        except FellrayError as error:
            if len(requests) == 1:
                return [_unreadable(error)]
        return [self._store([request])[0] for request in requests]

    def _log(self, client: str) -> EventLog:
        assert self._folder is not None
        with self._holding:
            if client not in self._logs:
                path = os.path.join(self._folder, f"{client}.jsonl")
                since = self._taken.get(client, {}).get("bytes", 0)
                self._logs[client] = EventLog(path, since)
                if len(self._logs) > self._kept:
                    self._logs.popitem(last=False)
            self._logs.move_to_end(client)
            return self._logs[client]


def _unreadable(error: FellrayError) -> Refusal:
    _log.error("events: %s", error)
    return Refusal(503, "events_unavailable", "the client's events cannot be used; the log has why")
