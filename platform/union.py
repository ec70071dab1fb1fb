"""All clients' interactions in one place, as no method here may have them: for orientation rows.

What is trained on them is asked for scores by whoever evaluates. It must not know how a model is
trained, nor clients' borders, which a central model does not see. Letters: I items, U users, N
interactions, B users of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix
from torch import Tensor

from fellray.platform.metrics import Evaluator, Score
from fellray.platform.shard import is_training
from fellray.platform.shards import Dataset

AT_ONCE = 512
"""Users that are scored together."""

Scorer = Callable[[np.ndarray, Sequence[np.ndarray]], Tensor]
"""Users' places in the union [B] and what each has met, oldest first -> scores [B, I]."""


@dataclass(frozen=True)
class Union:
    """Every client's training split; user u owns the rows offsets[u] to offsets[u + 1]."""

    users: np.ndarray
    """int64 [U], ascending"""
    offsets: np.ndarray
    """int64 [U + 1]"""
    items: np.ndarray
    """int32 [N], indices of items, a user's oldest first"""
    num_items: int

    def matrix(self) -> csr_matrix:
        """Who met what: float32 [U, I], one where a user met an item however often."""
        return mark(np.split(self.items, self.offsets[1:-1]), self.num_items)

    def places(self, users: np.ndarray) -> np.ndarray:
        """Where users stand: int64 [B], from their ids."""
        return np.searchsorted(self.users, users)


def gather(data: Dataset) -> Union:
    """What all clients train on, nothing held out among it."""
    shards = [data.shard(client) for client in data.clients]
    owner_N = np.concatenate([np.repeat(s.users, np.diff(s.offsets)) for s in shards])
    kept_N = is_training(np.concatenate([s.splits for s in shards]))
    owner_N, items_N = owner_N[kept_N], np.concatenate([s.items for s in shards])[kept_N]
    order_N = np.argsort(owner_N, kind="stable")  # a user's rows stay oldest first
    users = np.sort(np.concatenate([s.users for s in shards]))
    offsets = np.append(np.searchsorted(owner_N[order_N], users), len(order_N))
    return Union(users, offsets, items_N[order_N], len(data.item_ids))


def mark(histories: Sequence[np.ndarray], num_items: int) -> csr_matrix:
    """Histories as rows of ones: float32 [B, I]."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    columns = np.concatenate(histories) if len(histories) else np.empty(0, np.int32)
    shape = (len(histories), num_items)
    marks = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)
    marks.data[:] = 1  # repeats were summed
    return marks


def rank(
    data: Dataset, union: Union, scorer: Scorer, split: Literal[1, 2]
) -> Iterator[tuple[str, Score, list[Tensor]]]:
    """Full ranking of each client's held-out users, as every method is evaluated.

    Args:
        split: 1 validation, 2 test.

    Yields:
        Client, its score, and what the scorer said of its users, [B, I] each.
    """
    for client in data.clients:
        held = data.shard(client).held_out(split)
        evaluator = Evaluator(union.num_items)
        told = []
        for at in range(0, len(held.users), AT_ONCE):
            some = slice(at, at + AT_ONCE)
            told.append(scorer(union.places(held.users[some]), held.histories[some]))
            evaluator.add(told[-1], held.seen[some], held.truth[some])
        yield client, evaluator.score(), told
