"""Cold start: whose adapters answer for a client that has none of its own, decided by values alone.

    client       its own adapters
    neighbours   the mean of the adapters of its nearest clients, by the cosine of what was counted
    mean         the mean of all trained clients' adapters
    popularity   no model: counts

It must not know where counts or adapters lie, nor how a mean of adapters is made.

Shapes: C clients, I items, M items that are counted at least once, all clients one after the other.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Layer = Literal["client", "neighbours", "mean", "popularity"]
NEAREST = 3
"""Clients in a mixture."""


@dataclass(frozen=True)
class Known:
    """What is known about whoever asks."""

    learner: str | None
    """Whose adapters the client trains; None: it is no client of the run."""
    trained: Collection[str]
    """Learners whose adapters moved up to the round that is served."""
    has_history: bool
    """Whether there is anything to read."""


@dataclass(frozen=True)
class Counts:
    """How often each learner met each item, sparse."""

    learners: tuple[str, ...]
    starts_C: np.ndarray
    """int64: where a learner's items begin; every learner has some."""
    items_M: np.ndarray
    counts_M: np.ndarray
    """float64"""


def stack_counts(counts: Iterable[tuple[str, np.ndarray]]) -> Counts:
    """Learners with their counts [I], one at a time; who met nothing is left out."""
    learners, items, numbers = [], [np.empty(0, np.int64)], [np.empty(0)]
    for learner, counts_I in counts:
        if len(met := np.flatnonzero(counts_I)):
            learners.append(learner)
            items.append(met)
            numbers.append(counts_I[met].astype(np.float64))
    starts = np.cumsum([len(met) for met in items], dtype=np.int64)[:-1]
    return Counts(tuple(learners), starts, np.concatenate(items), np.concatenate(numbers))


def find_nearest(
    counts: Counts, asked_I: np.ndarray, among: Collection[str], most: int = NEAREST
) -> tuple[str, ...]:
    """Learners whose counts point most nearly the same way, sorted by name; equals by name.

    Args:
        asked_I: counts of whoever asks.
        among: who may be named.

    Returns:
        At most `most`; nobody whose cosine is 0.
    """
    if not counts.learners or not asked_I.any():
        return ()
    products = np.add.reduceat(counts.counts_M * asked_I[counts.items_M], counts.starts_C)
    norms = np.sqrt(np.add.reduceat(counts.counts_M**2, counts.starts_C))
    cosines = products / norms
    order = sorted(range(len(cosines)), key=lambda c: (-cosines[c], counts.learners[c]))
    named = (c for c in order if cosines[c] > 0 and counts.learners[c] in among)
    return tuple(sorted(counts.learners[c] for c, _ in zip(named, range(most), strict=False)))


def choose_layer(known: Known, nearest: Collection[str]) -> Layer:
    """The first rung that holds.

    A client that did not train stands on its own rung as long as nobody did: in the start, all
    adapters are one. `nearest` is asked for where the client did not train.
    """
    if not known.has_history:
        return "popularity"
    if known.learner is not None and (known.learner in known.trained or not known.trained):
        return "client"
    return "neighbours" if nearest else "mean"
