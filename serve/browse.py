"""Looking around, version 1 of the API: lists of clients, users and items, quality, live figures.

A client's token sees its own client and users, and no other's. It must not know how a ranking comes
about.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Path, Query, Request

from fellray.platform.errors import FellrayError
from fellray.platform.run import Run
from fellray.serve.args import Args
from fellray.serve.counters import Counters
from fellray.serve.histories import Histories
from fellray.serve.listings import (
    Added,
    ClientQuality,
    Clients,
    FoundItems,
    ListedClient,
    ListedUser,
    Live,
    Met,
    NewItems,
    Past,
    Quality,
    Users,
    Wanted,
    WantedItems,
    WantedPast,
    WantedUsers,
)
from fellray.serve.permission import caller_of, check, refuse_clients
from fellray.serve.quality import read_quality
from fellray.serve.recommender import Recommender
from fellray.serve.refusal import Refusal, refusals, refuse_client
from fellray.serve.schema import Whole, Written

RANKING = "/v1/recommend"
"""Routes that begin so answer with rankings: those are what live figures are about."""
_log = logging.getLogger("fellray.serve")
_UserId = Annotated[Whole, Written, Path()]


def add_browsing(
    api: FastAPI,
    recommender: Recommender,
    run: Run,
    counters: Counters,
    args: Args,
    labels: dict[str, str],
    asked: Sequence[Any],
) -> None:
    """Add the routes. Args: asked: what the document says of tokens."""
    listed: dict[str, Any] = {
        "dependencies": asked,
        "responses": refusals(401, 403, 404, 413, 422, 429, 503),
    }

    @api.get("/v1/clients", **listed)
    async def list_clients(wanted: Annotated[Wanted, Query()], request: Request) -> Clients:
        """The clients that the token opens."""
        own = caller_of(request).client
        names = [c for c in recommender.clients if own in (None, c) and c.startswith(wanted.prefix)]
        left = [name for name in names if wanted.after is None or name > wanted.after]
        return Clients(
            operator=own is None,
            total=len(names),
            clients=[
                ListedClient(client=name, users=recommender.num_users(name))
                for name in left[: wanted.limit]
            ],
        )

    @api.get("/v1/clients/{id}/users", **listed)
    async def list_users(
        id: str, wanted: Annotated[WantedUsers, Query()], request: Request
    ) -> Users:
        """A client's users."""
        own = await _read(recommender, id, request)
        kept = np.arange(len(own.users))
        if wanted.prefix:
            kept = kept[np.char.startswith(own.users.astype(str), wanted.prefix)]
        total = len(kept)
        if wanted.after is not None:
            kept = kept[own.users[kept] > wanted.after]
        few = kept[: wanted.limit]
        ids, sizes = own.users[few].tolist(), own.sizes[few].tolist()
        later = await recommender.events.count_later(id, ids)
        return Users(
            client=id,
            total=total,
            users=[
                ListedUser(user_id=user, interactions=size + more)
                for user, size, more in zip(ids, sizes, later, strict=True)
            ],
        )

    @api.get("/v1/clients/{id}/users/{user_id}", **listed)
    async def find_past(
        id: str, user_id: _UserId, wanted: Annotated[WantedPast, Query()], request: Request
    ) -> Past:
        """What a user met."""
        own = await _read(recommender, id, request)
        found = own.find(user_id, "now", await recommender.events.later(id, user_id))
        if found is None:
            raise Refusal(404, "unknown_user", "the client has no such user", "user_id")
        met, items = found[0], recommender.items
        newest = met[::-1][: wanted.limit].tolist()
        return Past(
            client=id,
            user_id=user_id,
            interactions=len(met),
            items=[Met(item_id=int(items.ids[at]), title=items.titles[at]) for at in newest],
        )

    @api.get("/v1/items", **listed)
    async def search_items(wanted: Annotated[WantedItems, Query()]) -> FoundItems:
        """Items by how their titles begin."""
        items = recommender.items
        found = items.search(wanted.title, wanted.limit)
        return FoundItems(items=[items.describe(at) for at in found])

    @api.post(
        "/v1/items",
        dependencies=asked,
        responses=refusals(401, 403, 409, 413, 415, 422, 429, 503),
    )
    async def add_items(new: NewItems, request: Request) -> Added:
        """Add items that are new since the training; recommendable at once. An operator's."""
        refuse_clients(request, "only an operator adds items")
        try:
            added = await asyncio.wrap_future(recommender.catalogue.add(new.items))
        except FellrayError as error:
            _log.warning("items cannot be added: %s", error)
            raise Refusal(503, "unavailable", "items cannot be added now") from None
        # a look takes a moment itself
        everywhere = 2 * args.poll_s
        return Added(added=added, items=len(recommender.items), everywhere_in_s=everywhere)

    @api.get("/v1/quality", **listed)
    async def find_quality(request: Request) -> Quality:
        """How well each client's users are served by the served round."""
        served, own = recommender.served, caller_of(request).client
        split, ndcg = await asyncio.to_thread(read_quality, run, served)
        clients = [c for c in sorted(ndcg) if own in (None, c) and recommender.has_client(c)]
        return Quality(
            run=run.config.name,
            round=served.round,
            split=split,
            clients=[
                ClientQuality(client=c, users=recommender.num_users(c), ndcg_at_10=ndcg[c])
                for c in clients
            ],
        )

    @api.get("/v1/live", **listed)
    async def find_live(request: Request) -> Live:
        """What this replica answered in the last minute. An operator's."""
        refuse_clients(request, "live figures are the operator's")
        recent = counters.recent(RANKING)
        p50_s, p99_s = recent.p50_s, recent.p99_s
        return Live(
            replica=labels.get("replica", ""),
            window_s=recent.window_s,
            requests=recent.requests,
            per_second=recent.requests / recent.window_s,
            p50_ms=None if p50_s is None else p50_s * 1000,
            p99_ms=None if p99_s is None else p99_s * 1000,
        )


async def _read(recommender: Recommender, client: str, request: Request) -> Histories:
    check(request, recommender.has_client, [client], "id")
    if not recommender.has_client(client):
        raise refuse_client("id")
    return await recommender.read_client(client)
