"""Verdicts: which pages do not count any more because a file of theirs was damaged.

    rounds/damaged.json    written by the driver alone, read by every holder

A verdict voids all pages that some clients have in a round, those of both sides of the cut alike:
their state is then the one before it. It stands as long as the round does, through every resume. It
must not know how damage is found.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fellray.platform.errors import FellrayError
from fellray.platform.storage import Storage

FILE = "rounds/damaged.json"


@dataclass(frozen=True)
class Verdict:
    """What was decided about one file."""

    round: int
    file: str
    clients: tuple[str, ...]
    """Whose pages of the round are void; nobody's where nothing was lost."""
    event: str
    """In words, for the record."""


class Verdicts:
    """All verdicts of one run, as far as they were looked at."""

    def __init__(self, storage: Storage) -> None:
        """`storage` is the run's folder."""
        self._storage = storage
        self._all: tuple[Verdict, ...] = ()
        self._void: dict[int, frozenset[str]] = {}
        self._looked = False

    def look(self) -> dict[int, frozenset[str]]:
        """Read what was decided since: round -> clients whose pages are void now and were not.

        Raises:
            FellrayError: the file is damaged itself, or the storage refuses.
        """
        before = self._void
        self._take(self._read() if self._storage.exists(FILE) else ())
        self._looked = True
        fresh = {n: clients - before.get(n, frozenset()) for n, clients in self._void.items()}
        return {n: clients for n, clients in fresh.items() if clients}

    def void(self, round: int) -> frozenset[str]:
        """Whose pages of a round do not count."""
        self._look_once()
        return self._void.get(round, frozenset())

    def events(self) -> list[str]:
        """What was decided, in words, oldest first."""
        self._look_once()
        return [one.event for one in self._all]

    def add(self, more: Sequence[Verdict]) -> None:
        """Decide; every holder that looks from now on knows.

        Raises:
            FellrayError: the storage refuses.
        """
        self._look_once()
        self._write((*self._all, *more))

    def drop(self, round: int) -> None:
        """A round is done again: what was decided about it and later ones is of no more use."""
        self._look_once()
        left = tuple(one for one in self._all if one.round < round)
        if left != self._all:
            self._write(left)

    def _look_once(self) -> None:
        if not self._looked:
            self.look()

    def _take(self, all: tuple[Verdict, ...]) -> None:
        self._all = all
        void: dict[int, frozenset[str]] = {}
        for one in all:
            void[one.round] = void.get(one.round, frozenset()) | frozenset(one.clients)
        self._void = void

    def _read(self) -> tuple[Verdict, ...]:
        try:
            tree = json.loads(self._storage.read(FILE))
            whole = tree["sha256"] == _digest(tree["verdicts"])
            all = tuple(
                Verdict(**{**one, "clients": tuple(one["clients"])}) for one in tree["verdicts"]
            )
        except (ValueError, KeyError, TypeError):
            whole, all = False, ()
        if not whole:
            raise FellrayError(
                f"{self._storage}/{FILE}: is truncated or changed; delete it and resume: pages "
                "that are damaged and still needed are found again"
            )
        return all

    def _write(self, all: tuple[Verdict, ...]) -> None:
        tree = [asdict(one) for one in all]
        text = json.dumps({"verdicts": tree, "sha256": _digest(tree)}, indent=1)
        self._storage.write(FILE, text.encode())
        self._take(all)


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
