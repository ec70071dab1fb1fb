"""Recommend: one history, one client's model, in this process; nothing is started."""

import asyncio

from pydantic import ValidationError

from fellray.platform.errors import FellrayError
from fellray.platform.run import read_run
from fellray.serve.args import Args
from fellray.serve.recommender import Recommender
from fellray.serve.refusal import Refusal
from fellray.serve.schema import MOST_K, Answer, ByHistory
from fellray.serve.served import verify
from fellray.serve.whole import open_whole

MOST_NAMED = 10
"""Clients that an error names one by one."""


def recommend(
    run: str, client: str, history: str, k: int = 10, round: int | None = None
) -> tuple[Answer, list[str]]:
    """The ranking for titles, `title; title` with the oldest first, and those not in the catalogue.

    Raises:
        FellrayError: there is no such run, round or client, or k or the history is out of range.
    """
    recommender = open_whole(Args(run=run, round="best" if round is None else round))
    try:
        verify(read_run(run), recommender.served.round, sorted(recommender.seats))
        _refuse_unknown(recommender, client)
        most = min(MOST_K, len(recommender.items))
        if not 1 <= k <= most:
            raise FellrayError(f"k={k}: must be from 1 to {most}")
        titles = recommender.items.split_history(history)
        query = ByHistory(client=client, history=[*titles], k=k)
        (answer,) = asyncio.run(recommender.recommend([query]))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise FellrayError(f"{field}: {first['msg']} (got {first['input']!r})") from None
    except Refusal as refusal:
        raise FellrayError(f"{refusal.field or run}: {refusal.message}") from None
    finally:
        recommender.close()
    return answer, [title for title in titles if not recommender.items.knows(title)]


def _refuse_unknown(recommender: Recommender, client: str) -> None:
    if recommender.has_client(client):
        return
    clients = recommender.clients
    few = ", ".join(clients[:MOST_NAMED])
    more = f" and {len(clients) - MOST_NAMED} more" if len(clients) > MOST_NAMED else ""
    raise FellrayError(f"client {client!r}: the run has no such client; it has {few}{more}")
