"""Seating: who sits in which actor. Neighbours by id share one, so many at a time.

It must not know what an actor is, nor what those who sit in it do.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np


def deal(learners: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Neighbours by id, so many at a time."""
    return [tuple(learners[at : at + size]) for at in range(0, len(learners), size)]


def describe_seats(seated: Sequence[str]) -> str:
    """Who sits in an actor, in words."""
    first, last = seated[0], seated[-1]
    return f"client {first}" if first == last else f"{len(seated)} clients, {first} to {last}"


def deal_ahead(learners: Sequence[str], size: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """`deal`, each few with those who follow them; nobody follows the last."""
    dealt = deal(learners, size)
    return list(zip_longest(dealt, dealt[1:], fillvalue=()))


def choose(learners: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """A sample that depends on the roster alone."""
    if count is None or count >= len(learners):
        return learners
    chosen = np.random.default_rng(0).choice(len(learners), count, replace=False)
    return tuple(learners[i] for i in sorted(chosen.tolist()))


class Seating:
    """Everybody's seat."""

    def __init__(self, learners: Sequence[str], together: int):
        """Args: learners: sorted ids. together: how many sit in one actor."""
        actors = deal(learners, together)
        self.num_actors = len(actors)
        self.of = {learner: i for i, seated in enumerate(actors) for learner in seated}
        """Learner -> its actor."""

    def split(self, learners: Sequence[str]) -> list[tuple[str, ...]]:
        """Who of them sits in which actor."""
        seated: list[list[str]] = [[] for _ in range(self.num_actors)]
        for learner in learners:
            seated[self.of[learner]].append(learner)
        return [tuple(here) for here in seated]

    def each(self, value: Any) -> list[Any]:
        """The same for every actor."""
        return [value] * self.num_actors
