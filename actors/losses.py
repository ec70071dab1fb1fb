"""Losses: which of Ray's errors say that an actor or its answer is gone, and what a person is told.

It must not know what is done about a loss (`platform/faults.py`), nor what an actor was asked for.
"""

from fellray.actors.session import ray
from fellray.platform.errors import FellrayError
from fellray.platform.messages import StaleLease

LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)
"""The actor is gone; or it had answered, and the answer went with the node on which it lay. What an
actor raised itself may be one of these as well: look for `RayTaskError` first."""


def name_cause(lost: Exception) -> str:
    """Why it is gone, in one line: what Ray says beside what it says of every loss."""
    if isinstance(lost, ray.exceptions.ObjectLostError):
        return f"its answer was lost with the node on which it lay: {type(lost).__name__}"
    if getattr(lost, "actor_init_failed", False):
        return words_of(lost).splitlines()[-1]
    lines = [one.strip() for one in str(lost).splitlines() if one.strip() and one[0] != "\t"]
    return lines[1 if len(lines) > 1 and isinstance(lost, ray.exceptions.ActorDiedError) else 0]


def words_of(error: Exception) -> str:
    """What a constructor said to the user; all of Ray's text where it said nothing."""
    _, marker, words = str(error).rpartition(f"{FellrayError.__name__}: ")
    return (words if marker else str(error)).strip()


def tell(error: ray.exceptions.RayTaskError) -> Exception:
    """What the actor raised, without Ray's wrapping where somebody is meant to read it."""
    cause = error.cause
    if isinstance(cause, LOST):
        return StaleLease(f"what an actor was sent was lost on its way ({name_cause(cause)})")
    return cause if isinstance(cause, FellrayError | StaleLease) else error
