"""What is listed, looked up and added besides rankings: closed types of the API, as in `schema`.

It must not know how an answer comes about.
"""

from typing import Annotated, Literal

from pydantic import Field

from fellray.serve.schema import VISIBLE, Closed, Id, Item, Name, Title, Whole, Written

MOST_LISTED = 1000
MOST_ADDED = 64

Limit = Annotated[int, Field(ge=1, le=MOST_LISTED), Written]


class Wanted(Closed):
    """Which part of a list."""

    prefix: Annotated[str, Field(max_length=200)] = ""
    """Only those that begin so."""
    after: Annotated[str, Field(max_length=200)] | None = None
    """Only those that come after this one in the list."""
    limit: Limit = 100


class WantedUsers(Closed):
    """Which part of a list of users."""

    prefix: Annotated[str, Field(max_length=200)] = ""
    """Only those whose ids begin so."""
    after: Annotated[Whole, Written] | None = None
    """Only those with larger ids than this."""
    limit: Limit = 100


class WantedItems(Closed):
    """Which items."""

    title: Annotated[str, Field(min_length=1, max_length=200, pattern=VISIBLE)]
    """How the title, or a word of it, begins."""
    limit: Annotated[int, Field(ge=1, le=100), Written] = 20


class WantedPast(Closed):
    """How much of a user's past."""

    limit: Limit = 100


class ListedClient(Closed):
    """A client of the run."""

    client: str
    users: int


class Clients(Closed):
    """Clients that a token opens, by name."""

    operator: bool
    """Whether the token opens all of them."""
    total: int
    """How many there are with this prefix."""
    clients: list[ListedClient]


class ListedUser(Closed):
    """A user of a client."""

    user_id: int
    interactions: int


class Users(Closed):
    """Users of one client, by id."""

    client: str
    total: int
    """How many there are with this prefix."""
    users: list[ListedUser]


class Met(Closed):
    """An item that a user met."""

    item_id: int
    title: str


class Past(Closed):
    """What one user met."""

    client: str
    user_id: int
    interactions: int
    """How many there are."""
    items: list[Met]
    """The newest of them, newest first."""


class FoundItems(Closed):
    """Items whose title begins so, then those where a word does; what was met most comes first."""

    items: list[Item]


class ClientQuality(Closed):
    """How well one client's users are served."""

    client: str
    users: int
    ndcg_at_10: float


class Quality(Closed):
    """Each client's quality at the served round: full ranking, mean over its users."""

    run: str
    round: int
    split: Literal["test", "valid"] | None
    """`test` where the run's summary is about this round, else its validation; null: neither."""
    clients: list[ClientQuality]
    """Those that the token opens, by name."""


class Live(Closed):
    """What one replica answered lately."""

    replica: str
    window_s: float
    """Seconds that are looked back on."""
    requests: int
    """Requests for recommendations in that time."""
    per_second: float
    p50_ms: float | None
    """Half of them took no longer than this; null: there were none."""
    p99_ms: float | None


class NewItem(Closed):
    """An item that was not there in training."""

    item_id: Id
    title: Title
    categories: list[Name] = Field(default=[], max_length=100)


class NewItems(Closed):
    """Items to be added, all or none."""

    items: Annotated[list[NewItem], Field(min_length=1, max_length=MOST_ADDED)]


class Added(Closed):
    """What was added."""

    added: int
    """Those that were not there yet: to send the same item again changes nothing."""
    items: int
    """Of the catalogue now."""
    everywhere_in_s: float
    """After so many seconds every replica recommends them."""
