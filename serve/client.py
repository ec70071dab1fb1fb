"""A client of a served run, for Python programs: typed questions and answers over HTTP.

    with Client("http://127.0.0.1:8000") as client:
        for place in client.recommend("c0", history=["Alien (1979)"]).items:
            print(place.rank, place.title, place.score)

The token is an argument, or the environment's FELLRAY_TOKEN. One connection is kept open, so a
client belongs to one thread at a time. This file must not know how an answer comes about, nor Ray
or torch.
"""

import os
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ValidationError

from fellray.platform.errors import FellrayError
from fellray.serve.listings import (
    Added,
    Clients,
    FoundItems,
    Live,
    NewItem,
    NewItems,
    Past,
    Quality,
    Users,
)
from fellray.serve.schema import (
    Answer,
    Answers,
    AsOf,
    ByHistory,
    ByUser,
    ClientState,
    Filters,
    Item,
    NewEvent,
    NewEvents,
    Queries,
    Receipt,
    RunState,
    RunStates,
    State,
)
from fellray.serve.transport import ServiceError, Transport

TOKEN = "FELLRAY_TOKEN"
"""The environment variable that holds the token where none is given."""
_Answer = TypeVar("_Answer", bound=BaseModel)


class Client:
    """One service, asked with one token."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout_s: float = 30.0,
        tries: int = 4,
        tls: ssl.SSLContext | None = None,
    ):
        """Nothing is sent yet.

        Args:
            timeout_s: for connecting, and for each wait for bytes.
            tries: times a request is sent before it is given up. All requests may be repeated:
                what they add, they add once. Status 429 and 503 and a lost connection are tried
                again, after what the service says or a growing pause; a timeout is not.
            tls: whom to trust, for https; by default whom the system trusts.

        Raises:
            FellrayError: the URL or the token is none.
        """
        token = os.environ.get(TOKEN) if token is None else token
        self._transport = Transport(url, token, timeout_s, tries, tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; a later request opens another."""
        self._transport.close()

    def recommend(
        self,
        client: str,
        *,
        user_id: int | None = None,
        history: Sequence[int | str] | None = None,
        k: int = 10,
        filters: Filters | None = None,
        candidates: Sequence[int] | None = None,
        as_of: AsOf = "now",
    ) -> Answer:
        """The best items for a user of a client, or for a history of item ids and titles.

        Raises:
            FellrayError: neither or both are given, or a value does not fit.
            ServiceError: the service refused, or cannot be reached.
        """
        if (user_id is None) == (history is None):
            raise FellrayError("give user_id or history, one of them")
        asked: dict[str, Any] = {"client": client, "k": k, "filters": filters or Filters()}
        if candidates is not None:
            asked["candidates"] = list(candidates)
        query: ByUser | ByHistory
        if user_id is not None:
            query = _make(ByUser, {**asked, "user_id": user_id, "as_of": as_of})
        else:
            query = _make(ByHistory, {**asked, "history": list(history or ())})
        return self._ask(Answer, "POST", "/v1/recommend", body=query)

    def recommend_batch(self, queries: Sequence[ByUser | ByHistory]) -> list[Answer]:
        """Answers in the order of the queries, all from one round.

        Raises:
            ServiceError: as `recommend`; `field` names the query.
        """
        body = _make(Queries, {"queries": list(queries)})
        return self._ask(Answers, "POST", "/v1/recommend/batch", body=body).answers

    def item(self, item_id: int) -> Item:
        """One item."""
        return self._ask(Item, "GET", f"/v1/items/{item_id}")

    def items(self, title: str, limit: int = 20) -> list[Item]:
        """Items whose title, or a word of it, begins so."""
        wanted = {"title": title, "limit": limit}
        return self._ask(FoundItems, "GET", "/v1/items", wanted).items

    def add_items(self, items: Sequence[NewItem]) -> Added:
        """Add items that are new since the training, all or none; an operator's token is needed."""
        return self._ask(Added, "POST", "/v1/items", body=_make(NewItems, {"items": list(items)}))

    def add_events(self, events: Sequence[NewEvent]) -> Receipt:
        """Store what users have met since, all or none; the answer says that it is on the disk.

        Sent again, by this client or another one, an event is stored once.
        """
        return self._ask(Receipt, "POST", "/v1/events", body=_make(NewEvents, {"events": events}))

    def clients(self, prefix: str = "", after: str | None = None, limit: int = 100) -> Clients:
        """Clients that the token opens, by name."""
        return self._ask(Clients, "GET", "/v1/clients", _list(prefix, after, limit))

    def client(self, client: str) -> ClientState:
        """One client."""
        return self._ask(ClientState, "GET", f"/v1/clients/{_part(client)}")

    def users(
        self, client: str, prefix: str = "", after: int | None = None, limit: int = 100
    ) -> Users:
        """Users of a client, by id."""
        path = f"/v1/clients/{_part(client)}/users"
        return self._ask(Users, "GET", path, _list(prefix, after, limit))

    def past(self, client: str, user_id: int, limit: int = 100) -> Past:
        """What a user met, newest first."""
        path = f"/v1/clients/{_part(client)}/users/{user_id}"
        return self._ask(Past, "GET", path, {"limit": limit})

    def quality(self) -> Quality:
        """NDCG@10 of the served round, by client."""
        return self._ask(Quality, "GET", "/v1/quality")

    def live(self) -> Live:
        """What one replica answered in the last minute; an operator's token is needed."""
        return self._ask(Live, "GET", "/v1/live")

    def runs(self) -> list[RunState]:
        """What is served."""
        return self._ask(RunStates, "GET", "/v1/runs").runs

    def health(self, ready: bool = False) -> State:
        """That the service lives; with `ready`, that its trunk answers too. No token is needed."""
        return self._ask(State, "GET", "/readyz" if ready else "/healthz")

    def _ask(
        self,
        kind: type[_Answer],
        method: str,
        path: str,
        wanted: Mapping[str, Any] | None = None,
        body: BaseModel | None = None,
    ) -> _Answer:
        target = path + (f"?{urlencode(wanted)}" if wanted else "")
        data = body.model_dump_json(exclude_none=True).encode() if body else None
        raw = self._transport.ask(method, target, data)
        try:
            return kind.model_validate_json(raw)
        except ValidationError as error:
            why = "answers something else than this fellray knows"
            raise ServiceError(f"{self._transport.url}: {why}: {error}", 200, raw) from None


def _list(prefix: str, after: int | str | None, limit: int) -> dict[str, Any]:
    wanted: dict[str, Any] = {"prefix": prefix, "limit": limit}
    return wanted if after is None else {**wanted, "after": after}


def _part(name: str) -> str:
    """A name as one part of a path."""
    return quote(name, safe="")


def _make(kind: type[_Answer], tree: dict[str, Any]) -> _Answer:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise FellrayError(f"{field}: {first['msg']}") from None
