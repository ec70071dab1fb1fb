"""Where a run comes from that continues another one, and where a run went on: two small files.

Both name runs that lie side by side, so that the folder of runs may move. It must not know what a
run holds.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from fellray.platform.errors import FellrayError
from fellray.platform.storage import Storage
from fellray.platform.strict_json import to_json

ORIGIN = "origin.json"
CONTINUATION = "continuation.json"
_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """In the folder of a run that continues another."""

    run: str
    """The one it continues."""
    round: int
    """Whose state of that run it began with."""
    first: str
    """The run that began the line: its folder holds the events and later items of all of them."""


@dataclass(frozen=True)
class Continuation:
    """In the folder of a run that is continued. There is one: no event is taken twice."""

    run: str
    """The one that continues it."""
    round: int
    """The round that it begins with."""
    rounds: int
    """How many it trains."""


def read_origin(storage: Storage) -> Origin | None:
    """Of the run in a folder; None: it began by itself.

    Raises:
        FellrayError: the file is damaged.
    """
    tree = _read(storage, ORIGIN, {"run": str, "round": int, "first": str})
    return Origin(**tree) if tree else None


def read_continuation(storage: Storage) -> Continuation | None:
    """Of the run in a folder; None: it was not continued.

    Raises:
        FellrayError: the file is damaged.
    """
    tree = _read(storage, CONTINUATION, {"run": str, "round": int, "rounds": int})
    return Continuation(**tree) if tree else None


def write_record(storage: Storage, record: Origin | Continuation) -> None:
    """Put it into the run's folder."""
    name = ORIGIN if isinstance(record, Origin) else CONTINUATION
    text = to_json({"version": _VERSION, **asdict(record)}, f"{storage}/{name}", indent=2)
    storage.write(name, f"{text}\n".encode())


def find_first(storage: Storage) -> Storage:
    """The folder of the run that began the line of the run in a folder: that run's own, perhaps.

    Raises:
        FellrayError: `origin.json` is damaged.
    """
    origin = read_origin(storage)
    return storage.beside(origin.first) if origin else storage


def event_folder(storage: Storage, given: str | None = None) -> str | None:
    """Where the events of the run in a folder lie; None: on no disk, so that none can be stored.

    Args:
        given: another folder than the one with the run that began the line.

    Raises:
        FellrayError: `origin.json` is damaged.
    """
    if given is not None:
        return Storage(given).local()
    return find_first(storage).local("events")


def _read(storage: Storage, name: str, fields: dict[str, type]) -> dict[str, Any] | None:
    if not storage.exists(name):
        return None
    try:
        tree = json.loads(storage.read(name))
        found = {field: tree[field] for field in fields}
        if tree["version"] != _VERSION or any(type(found[f]) is not t for f, t in fields.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise FellrayError(f"{storage}/{name}: is damaged; restore it") from None
    return found
