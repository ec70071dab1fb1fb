"""New interactions over the API: checked, stored once, and part of their users' next request.

Every replica writes to the same files, one for each client, and looks at them before it answers, so
what one replica has stored counts for all at once. An event may be of an item that came after the
training. It must not know Ray, nor how a file is written.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from fellray.platform.batcher import Batcher
from fellray.platform.errors import FellrayError
from fellray.platform.events import WAIT_S, Event, EventLog
from fellray.platform.intake import Conflict, Stored, add_events
from fellray.platform.shards import Dataset
from fellray.serve.catalogue import Catalogue
from fellray.serve.histories import NOTHING, Histories
from fellray.serve.recent import Recent
from fellray.serve.refusal import Refusal, refuse_client
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
        catalogue: Catalogue,
        histories: Callable[[str], Awaitable[Histories]],
        kept: int,
        timeout_s: float,
    ):
        """Args: folder: None: there is none, and nothing is stored. histories: of a client of the
        run. kept: clients whose events are held in memory. timeout_s: after so long a request is
        given up."""
        self._folder = folder
        self._taken: dict[str, dict[str, Any]] = data.manifest.get("events", {})
        self._clients = frozenset(data.clients)
        self._catalogue = catalogue
        self._histories = histories
        self._timeout_s = timeout_s
        self._logs: Recent[EventLog] = Recent(kept)
        self._holding = threading.Lock()
        self._batcher = Batcher(MOST_EVENTS)

    async def add(self, events: Sequence[NewEvent]) -> Receipt:
        """Store them all, or none.

        Raises:
            Refusal: one names what is not there, or has another one's id; or the disk refuses, or
                others hold a file for too long.
        """
        if self._folder is None:
            why = "the run lies on no disk; the operator can start the service with events=FOLDER"
            raise Refusal(503, "no_events", why)
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._add(events)
        except TimeoutError:
            why = f"not stored within {self._timeout_s:g} s; sent again, each is stored once"
            raise Refusal(503, "overloaded", why) from None
        if isinstance(answer, Conflict):
            why = "another event of this client has the id"
            raise Refusal(409, "other_event", why, f"events.{answer.place}.event_id")
        return Receipt(stored=answer.new, known=answer.known)

    async def later(self, client: str, user_id: int) -> np.ndarray:
        """Indices of the items that a user has met since the data were prepared, oldest first.

        They are in the catalogue as it is when this returns.

        Raises:
            Refusal: the client's events cannot be read.
        """
        met = await self._read(client, lambda log: log.later(user_id))
        if not met:
            return NOTHING
        at = await self._locate(met)
        if (at < 0).any():
            _log.warning("items that a user met are not there any more: restore items/")
        return at[at >= 0]

    async def count_later(self, client: str, user_ids: Sequence[int]) -> Sequence[int]:
        """How many items each of these users has met since the data were prepared.

        Raises:
            Refusal: as `later`.
        """
        return await self._read(client, lambda log: log.count_later(user_ids)) or [0] * len(
            user_ids
        )

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._batcher.close()

    async def _add(self, events: Sequence[NewEvent]) -> Stored | Conflict:
        await self._check(events)
        asked = [(e.client, Event(e.event_id, e.user_id, e.item_id, e.timestamp)) for e in events]
        future = self._batcher.submit(self._store, asked, len(asked))
        answer: Stored | Conflict = await asyncio.wrap_future(future)
        return answer

    async def _read(self, client: str, look: Callable[[EventLog], list[int]]) -> list[int]:
        """Nothing where no events are stored at all."""
        if self._folder is None:
            return []
        try:
            log = self._log(client)
            if log.behind() > _LITTLE:
                await asyncio.to_thread(log.catch_up)
            return look(log)
        except FellrayError as error:
            raise _unreadable(error) from None

    async def _locate(self, item_ids: Sequence[int]) -> np.ndarray:
        """Indices of items; -1: there is no such item, nor has another replica just added it."""
        at = self._catalogue.items.locate(item_ids)
        if (at < 0).any():
            await asyncio.to_thread(self._catalogue.look)
            at = self._catalogue.items.locate(item_ids)
        return at

    async def _check(self, events: Sequence[NewEvent]) -> None:
        latest = time.time() + AHEAD_S
        for place, event in enumerate(events):
            if event.client not in self._clients:
                raise refuse_client(f"events.{place}.client")
            if event.timestamp > latest:
                why = "lies in the future; it is in seconds since 1970"
                raise Refusal(422, "bad_timestamp", why, f"events.{place}.timestamp")
        strange = await self._locate([event.item_id for event in events]) < 0
        if strange.any():
            where = f"events.{int(strange.argmax())}.item_id"
            raise Refusal(404, "unknown_item", "the catalogue has no such item", where)
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
        """Of whoever waited together: one wait for the disk. Where that fails, each on its own, and
        other writers are waited for no longer than once."""
        deadline = time.monotonic() + min(WAIT_S, self._timeout_s)
        return self._store_until(deadline, requests)

    def _store_until(
        self, deadline: float, requests: Sequence[Sequence[tuple[str, Event]]]
    ) -> Sequence[Stored | Conflict | Refusal]:
        clients = {client for request in requests for client, _ in request}
        logs = {client: self._log(client) for client in clients}
        try:
            return add_events(requests, logs, max(0.0, deadline - time.monotonic()))
        except FellrayError as error:
            if len(requests) == 1:
                return [_unreadable(error)]
        return [self._store_until(deadline, [request])[0] for request in requests]

    def _log(self, client: str) -> EventLog:
        assert self._folder is not None
        with self._holding:
            if log := self._logs.find(client):
                return log
            path = os.path.join(self._folder, f"{client}.jsonl")
            since = self._taken.get(client, {}).get("bytes", 0)
            return self._logs.keep(client, EventLog(path, since))


def _unreadable(error: FellrayError) -> Refusal:
    _log.error("events: %s", error)
    return Refusal(503, "events_unavailable", "the client's events cannot be used; the log has why")
