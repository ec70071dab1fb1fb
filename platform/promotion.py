"""Which round of a run is served: a small file beside the rounds, replaced whole.

Without it, whoever serves decides. It must not know who serves, nor what a round holds.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fellray.platform.errors import FellrayError
from fellray.platform.storage import Storage
from fellray.platform.strict_json import to_json

FILE = "serving.json"
LOCK = "serving"
LOCK_S = 10.0
"""How long one who changes the file waits for another."""
MOST = 16
"""Promotions that can be taken back; older ones are forgotten, and their rounds may go."""


@dataclass(frozen=True)
class Promotion:
    """The rounds that were promoted and not taken back, the served one last."""

    rounds: tuple[int, ...] = ()

    @property
    def served(self) -> int | None:
        """None: nobody has said which."""
        return self.rounds[-1] if self.rounds else None


def read_promotion(storage: Storage) -> Promotion:
    """What was promoted in a run's folder.

    Raises:
        FellrayError: the file is damaged.
    """
    if not storage.exists(FILE):
        return Promotion()
    try:
        tree = json.loads(storage.read(FILE))
        rounds = tree["rounds"]
        if tree["version"] != 1 or not all(type(r) is int and r >= 0 for r in rounds):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise FellrayError(
            f"{storage}/{FILE}: is damaged; delete it, then `fellray promote` a round"
        ) from None
    return Promotion(tuple(rounds))


def promote(storage: Storage, round: int, committed: Callable[[], Collection[int]]) -> Promotion:
    """Serve this round from now on, and keep it on storage.

    Args:
        committed: the rounds that are there now.

    Raises:
        FellrayError: it is not committed, or a training gave it up meanwhile; or somebody else
            changes the file for too long.
    """
    _refuse_missing(storage, round, committed())
    with storage.lock(LOCK, LOCK_S) as still_held:
        before = held = read_promotion(storage).rounds
        if held[-1:] != (round,):
            held = (*held, round)[-MOST:]
        still_held()
        promotion = _write(storage, held)
        try:
            # whoever trains may have looked at the file before this one stood in it
            _refuse_missing(storage, round, committed())
        except FellrayError:
            _write(storage, before)
            raise
    return promotion


def roll_back(storage: Storage) -> Promotion:
    """Take the last promotion back: the one before it is served again.

    Raises:
        FellrayError: nothing is promoted.
    """
    with storage.lock(LOCK, LOCK_S) as still_held:
        held = read_promotion(storage).rounds
        if not held:
            raise FellrayError(
                f"{storage}: no round is promoted, so there is nothing to take back; "
                "`fellray promote` names one"
            )
        still_held()
        return _write(storage, held[:-1])


def _refuse_missing(storage: Storage, round: int, committed: Collection[int]) -> None:
    if round not in committed:
        kept = ", ".join(map(str, sorted(committed))) or "none"
        raise FellrayError(f"{storage}: holds no round {round}; committed rounds: {kept}")


def _write(storage: Storage, rounds: tuple[int, ...]) -> Promotion:
    text = to_json({"version": 1, "rounds": rounds}, f"{storage}/{FILE}", indent=2)
    storage.write(FILE, f"{text}\n".encode())
    return Promotion(rounds)
