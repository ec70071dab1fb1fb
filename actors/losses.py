"""Losses: which of Ray's errors say that an actor or its answer is gone, and what a person is told.

It must not know what is done about a loss (`platform/faults.py`), nor what an actor was asked for.
"""

import torch

from fellray.actors.session import ray
from fellray.platform.errors import FellrayError
from fellray.platform.messages import StaleLease

LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
)
"""The actor is gone; or it had answered, and the answer went with the node on which it lay; or Ray
ended it for its node's memory. What an actor raised itself may be one of these as well: look for
`RayTaskError` first."""

WAYS_OUT = {
    "client": "let fewer clients train side by side (clients.slots) or sit in an actor "
    "(clients.per_actor), or take smaller steps (train.batch_size)",
    "server": "let it compute and keep less at once (server.max_tokens, server.keep_graphs_mib), "
    "or fewer clients train side by side (clients.slots)",
}
"""Of an actor that runs out of memory, by the name of its row."""
_SHORT = ("allocate memory", "not enough memory", "out of memory", "alloc_failed")
"""What libraries say that have no exception for it; in lower case."""


def name_cause(lost: Exception) -> str:
    """Why it is gone, in one line: what Ray says beside what it says of every loss."""
    if isinstance(lost, ray.exceptions.ObjectLostError):
        return f"its answer was lost with the node on which it lay: {type(lost).__name__}"
    if getattr(lost, "actor_init_failed", False):
        return words_of(lost).splitlines()[-1]
    if isinstance(lost, ray.exceptions.OutOfMemoryError):
        return f"Ray ended it, its node was short of memory: {str(lost).strip().splitlines()[0]}"
    lines = [one.strip() for one in str(lost).splitlines() if one.strip() and one[0] != "\t"]
    return lines[1 if len(lines) > 1 and isinstance(lost, ray.exceptions.ActorDiedError) else 0]


def words_of(error: Exception) -> str:
    """What a constructor said to the user; all of Ray's text where it said nothing."""
    _, marker, words = str(error).rpartition(f"{FellrayError.__name__}: ")
    return (words if marker else str(error)).strip()


def tell(error: ray.exceptions.RayTaskError, row: str, actor: str) -> Exception:
    """What the actor raised, without Ray's wrapping where somebody is meant to read it.

    Args:
        row: what kind of actor it is, `client` or `server`.
        actor: which one, in words.
    """
    whole: Exception = error
    cause: Exception = error.cause
    if isinstance(cause, FellrayError | StaleLease):
        return cause
    if isinstance(cause, LOST):
        return StaleLease(f"what an actor was sent was lost on its way ({name_cause(cause)})")
    if ran_out_of_memory(cause):
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        return FellrayError(
            f"{actor} ran out of memory ({said}): {WAYS_OUT[row]}; with clients.per_actor alone "
            "changed the run goes on, all else needs a run of another name"
        )
    return whole


def ran_out_of_memory(cause: Exception) -> bool:
    """Whether an actor's error means that, whichever library raised it."""
    if isinstance(cause, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(cause).lower()
    return isinstance(cause, RuntimeError | OSError | ray.exceptions.RayError) and any(
        short in words for short in _SHORT
    )
