"""What to do when an actor is lost: a decision as a value. Whoever asked carries it out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fellray.platform.manifest import Uncommitted
from fellray.platform.messages import StaleLease
from fellray.platform.rounds import Rounds

TRIES = 8
"""Times one piece of work is begun before the run gives up."""

MAY_BE_MEMORY = (
    "if nothing else explains it, memory may have run out: `dmesg` on its node names what the "
    "system ended, raylet.out in Ray's logs (/tmp/ray/session_latest/logs) what Ray did; then "
    "lower clients.slots, clients.per_actor, server.max_tokens or server.keep_graphs_mib"
)
"""Whoever is ended for it cannot say so itself."""


@dataclass(frozen=True)
class Replay:
    """Begin the work again, from the committed state, after a pause."""

    pause_s: float


@dataclass(frozen=True)
class Stop:
    """Give up; the run stays resumable."""

    reason: str


def decide(tries: int, never_started: bool, reason: str, damaged: bool = False) -> Replay | Stop:
    """A lost actor is replayed, ever more patiently; one that cannot even start is not.

    Args:
        tries: how often this work was begun so far.
        never_started: the actor's constructor failed: beginning again would fail again.
        reason: what was seen.
        damaged: nobody was lost: a file is not what was written.
    """
    if never_started:
        return Stop(f"an actor cannot start: {reason}")
    if tries >= TRIES:
        told = f"lost {tries} times, last: {reason}"
        return Stop(told if damaged else f"{told}; {MAY_BE_MEMORY}")
    return Replay(min(0.25 * 2 ** (tries - 1), 4.0))


@contextmanager
def committed(rounds: Rounds, round: int) -> Iterator[None]:
    """Reading a round: a holder that was restarted can take up committed rounds only.

    Raises:
        StaleLease: the round was installed, but its holder lost it before it was committed.
    """
    try:
        yield
    except Uncommitted:
        latest = rounds.latest()
        if latest is None or round > latest:
            raise StaleLease(f"round {round} was lost before it was committed") from None
        raise
