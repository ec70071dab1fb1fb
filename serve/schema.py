"""What is asked over HTTP or through a handle, and what is answered: closed types.

Ids are whole numbers (in JSON, 3.0 is 3) and texts are texts: nothing else is converted, no key is
ignored; one that stands twice is refused before it gets here. It must not know how an answer comes
about.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from fellray.serve.ladder import Layer

AsOf = Literal["now", "valid", "test"]
"""Everything a user met, or what came before the validation or test item, as evaluation has it."""
MOST_HISTORY = 1000
MOST_ITEMS = 10_000
MOST_QUERIES = 64
MOST_K = 1000
MOST_EVENTS = 500
_NUMBER = re.compile(r"-?[0-9]{1,19}(\.0+)?")

MOST_WHOLE = 2**63 - 1
"""Inclusive bounds: readers of the document that know 64 bits only cannot write 2 ** 63."""
_MOST_EXACT = 2**53


def _read_written(text: Any) -> Any:
    """Of a path or query; Python's own reading knows further spellings, as 1_0 for 10."""
    if isinstance(text, str) and not _NUMBER.fullmatch(text):
        raise ValueError("write a whole number in digits")
    return text


def _read_whole(value: Any) -> Any:
    """Of JSON, to which 3.0 is whole too; of a large one it cannot be known which it was."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MOST_EXACT:
        return int(value)
    return value


Written = BeforeValidator(_read_written)
_Exact = BeforeValidator(_read_whole)
Whole = Annotated[int, Field(ge=-MOST_WHOLE - 1, le=MOST_WHOLE)]
Id = Annotated[Whole, Field(strict=True), _Exact]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=200)]
VISIBLE = r"[^\s\x85\x1c-\x1f\ufeff]"
"""A character that no reader of patterns takes for white space: they differ in what \\s is."""
Title = Annotated[str, Field(strict=True, min_length=1, max_length=1000, pattern=VISIBLE)]
ItemIds = Annotated[list[Id], Field(min_length=1, max_length=MOST_ITEMS)]


SourceId = Annotated[str | None, Field(exclude_if=lambda told: told is None)]
"""Left out of the answer where there is none."""


class Closed(BaseModel):
    """Frozen, and deaf to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Filters(Closed):
    """Which items may be recommended."""

    seen: Annotated[bool, Field(strict=True)] = True
    """Leave out what the user has met."""
    categories: Annotated[list[Name], Field(min_length=1, max_length=100)] | None = None
    """Only items in at least one of these categories."""
    allow: ItemIds | None = None
    """Only these items."""
    deny: ItemIds | None = None
    """None of these items."""


class _Query(Closed):
    client: Name
    """Whose user it is: the client's own adapters and counts answer."""
    k: Annotated[int, Field(strict=True, ge=1, le=MOST_K), _Exact] = 10
    """How many items; fewer come where fewer are left."""
    filters: Filters = Filters()
    candidates: ItemIds | None = None
    """Rank these items; without, all are ranked."""


class ByUser(_Query):
    """For a user whose history the client holds."""

    user_id: Id
    as_of: AsOf = "now"
    """`test` and `valid`: as the evaluation sees the user, before the held-out item."""


class ByHistory(_Query):
    """For anybody, by what they met."""

    history: Annotated[list[Id | Title], Field(max_length=MOST_HISTORY)]
    """Ids of items and titles, oldest first. Titles need not be in the catalogue."""


def _tell(value: Any) -> str:
    by_user = "user_id" in value if isinstance(value, dict) else isinstance(value, ByUser)
    return "ByUser" if by_user else "ByHistory"


Query = Annotated[
    Annotated[ByUser, Tag("ByUser")] | Annotated[ByHistory, Tag("ByHistory")],
    Discriminator(_tell),
]


class Queries(Closed):
    """Several queries, answered from one round."""

    queries: Annotated[list[Query], Field(min_length=1, max_length=MOST_QUERIES)]


class NewEvent(Closed):
    """A user met an item."""

    event_id: Name
    """Yours; unique within the client. Sent again, it is stored once."""
    client: Name
    user_id: Id
    item_id: Id
    timestamp: Annotated[int, Field(strict=True, ge=0, le=MOST_WHOLE), _Exact]
    """Seconds since 1970."""


class NewEvents(Closed):
    """Several events of one or more clients; all are stored, or none."""

    events: Annotated[list[NewEvent], Field(min_length=1, max_length=MOST_EVENTS)]


class Receipt(Closed):
    """All events of the request are on the disk."""

    stored: int
    """New ones."""
    known: int
    """Those that were stored before."""


class Place(Closed):
    """One place of a ranking."""

    rank: int
    """1 is the best."""
    item_id: int
    title: str
    score: float
    """Comparable within one answer only."""
    source_id: SourceId = None
    """What the source calls the item, where its ids are text."""


class Answer(Closed):
    """A ranking, and where it comes from."""

    run: str
    round: int
    """The committed round whose adapters answered, from start to end."""
    client: str
    layer: Layer
    """Which rung of the ladder answered."""
    items: list[Place]


class Answers(Closed):
    """In the order of the queries."""

    answers: list[Answer]


class Item(Closed):
    """What is known of an item."""

    item_id: int
    title: str
    categories: list[str]
    popularity: int
    """How often it was met in all clients' training splits."""
    source_id: SourceId = None
    """What the source calls the item, where its ids are text."""


class ClientState(Closed):
    """A client of the run at the served round."""

    client: str
    users: int
    round: int
    layer: Layer
    """What answers for its users."""
    validation_ndcg_at_10: float | None
    """Of the served round, where it was validated."""


class RunState(Closed):
    """The run that is served."""

    run: str
    method: str
    round: int
    """Served now."""
    promoted: bool
    """Whether somebody named the round."""
    committed: list[int]
    clients: int
    items: int


class RunStates(Closed):
    """All runs that are served."""

    runs: list[RunState]


class State(Closed):
    """Whether the service lives, or is ready."""

    status: Literal["ok"]


class Fault(Closed):
    """What was wrong, and where."""

    code: str
    message: str
    field: str | None


class Refused(Closed):
    """The body of every answer that is none."""

    error: Fault
