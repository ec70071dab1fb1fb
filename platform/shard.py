"""One client's interactions: its histories, its training targets and what is held out.

It must not know the folder that it lies in, nor other clients. Letters: I items, U users of the
client, N its interactions, M training targets, H users with something held out.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

LATER = 3
"""The split of what a user met after the data were first prepared. It is trained on and counted;
what is held out came before it, so no history of an evaluation has it."""


def is_training(splits: np.ndarray) -> np.ndarray:
    """Which rows are trained on and counted: bool, like `splits`."""
    return np.isin(splits, (0, LATER))


@dataclass(frozen=True)
class Held:
    """What one split holds back of each user who has a history before it; H users."""

    users: np.ndarray
    """int64 [H]"""
    histories: list[np.ndarray]
    """H int32 arrays: all earlier items, oldest first."""
    seen: list[np.ndarray]
    """H int32 arrays: the history without what `truth` repeats; the items a ranking masks."""
    truth: list[np.ndarray]
    """H int32 arrays: the items of the split, oldest first."""


@dataclass(frozen=True)
class Shard:
    """One client's interactions; user u owns the rows offsets[u] to offsets[u + 1], oldest first.

    Along a user's rows `splits` never decreases.
    """

    client: str
    users: np.ndarray
    """int64 [U], ascending"""
    offsets: np.ndarray
    """int64 [U + 1]"""
    items: np.ndarray
    """int32 [N], indices of items"""
    splits: np.ndarray
    """uint8 [N], 0 training, 1 validation, 2 test, LATER"""

    def counts(self, num_items: int) -> np.ndarray:
        """int64 [I]: how often each item occurs in this client's training split."""
        return np.bincount(self.items[is_training(self.splits)], minlength=num_items)

    def train_targets(self) -> np.ndarray:
        """int64 [M]: rows of the training split with an earlier one of the same user."""
        usable = is_training(self.splits)
        usable[self.offsets[:-1]] = False
        return np.flatnonzero(usable)

    def readable(self) -> "Shard":
        """The rows that training may read: without those held out, where training follows them.

        A row that is trained on has then nothing held out in its history.
        """
        if not (self.splits == LATER).any():
            return self
        kept = is_training(self.splits)
        return Shard(
            self.client,
            self.users,
            np.concatenate([[0], np.cumsum(kept)])[self.offsets],
            self.items[kept],
            self.splits[kept],
        )

    def history(self, n: int, max_history: int) -> np.ndarray:
        """int32, at most max_history: the same user's items before row n, oldest first."""
        assert 0 <= n < len(self.items), n
        start = self.offsets[np.searchsorted(self.offsets, n, side="right") - 1]
        return self.items[max(start, n - max_history) : n]

    def held_out(self, split: Literal[1, 2]) -> Held:
        """The truth of a split (1 validation, 2 test), and what came before it.

        Before validation lies training; before test, training and validation.
        """
        user_N = np.repeat(np.arange(len(self.users)), np.diff(self.offsets))
        before_U = np.bincount(user_N[self.splits < split], minlength=len(self.users))
        held_U = np.bincount(user_N[self.splits == split], minlength=len(self.users))
        kept_U = (before_U > 0) & (held_U > 0)
        is_history = (self.splits < split) & kept_U[user_N]
        is_truth = (self.splits == split) & kept_U[user_N]
        key_N = user_N * (int(self.items.max(initial=0)) + 1) + self.items
        is_seen = is_history & ~np.isin(key_N, key_N[is_truth])
        seen_U = np.bincount(user_N[is_seen], minlength=len(self.users))
        return Held(
            users=self.users[kept_U],
            histories=_pieces(self.items[is_history], before_U[kept_U]),
            seen=_pieces(self.items[is_seen], seen_U[kept_U]),
            truth=_pieces(self.items[is_truth], held_U[kept_U]),
        )


def _pieces(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1]) if len(sizes) else []
