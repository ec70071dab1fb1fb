"""One client's users: what each met, and what the client counted. It stays on the private side.

It must not know requests, rounds or models. Shapes: I items.
"""

import numpy as np
import torch

from fellray.platform.shard import Shard
from fellray.serve.schema import AsOf

_SPLIT = {"valid": 1, "test": 2, "now": 3}


class Histories:
    """The users of one client."""

    def __init__(self, shard: Shard, num_items: int):
        self._shard = shard
        self.counts_I = shard.counts(num_items)
        """int64: how often each item occurs in the client's training split."""
        self.prior_I = torch.from_numpy(self.counts_I).float().log1p()

    @property
    def users(self) -> np.ndarray:
        """Ids of the client's users, int64, ascending."""
        return self._shard.users

    @property
    def sizes(self) -> np.ndarray:
        """int64: how many interactions each of them has."""
        return np.diff(self._shard.offsets)

    def find(self, user_id: int, as_of: AsOf) -> tuple[np.ndarray, np.ndarray] | None:
        """What a user met, oldest first, and what of it is not recommended; None: no such user.

        Both are indices of items. In evaluation's view an item that is the truth as well stays a
        candidate, as in `platform.shard.Held`.
        """
        users = self._shard.users
        at = int(np.searchsorted(users, user_id))
        if at == len(users) or int(users[at]) != user_id:
            return None
        rows = slice(int(self._shard.offsets[at]), int(self._shard.offsets[at + 1]))
        items, splits = self._shard.items[rows].astype(np.int64), self._shard.splits[rows]
        split = _SPLIT[as_of]
        met, truth = items[splits < split], items[splits == split]
        return met, met[~np.isin(met, truth)]
