"""From shards to batches: which histories a learner reads in a step, and as which tokens.

Draws are counter-based: a round's order follows from (seed, learner, round) alone, so nothing of it
is stored and a replay reads the same rows. Token ids and targets made here stay on the client.

Shapes: N rows of a step, H items of a history, L real tokens of all rows together, I items.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fellray.platform.config import RunConfig
from fellray.platform.encoder import Tokens
from fellray.platform.errors import FellrayError
from fellray.platform.own import ALIKE, Own
from fellray.platform.rows import Rows
from fellray.platform.shard import Shard

EVALUATION_ROWS = 128
"""Histories in one forward pass of an evaluation."""


@dataclass(frozen=True)
class Batch:
    """Histories of one step, of one or many learners."""

    slot_N: Tensor
    """Whose adapters each row uses: the learner's place in the actor, int64."""
    shard_N: Tensor
    """Whose data each row is: the shard's place in the actor, int64."""
    rows: Rows
    ids_L: Tensor
    """Token ids, packed, int64."""
    label_L: Tensor | None = None
    """Where a model learns to write: the token that follows each, -100 where nobody asks."""


def assemble(tokens: Tokens, items_NH: np.ndarray, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids of histories, oldest item first, between the special tokens.

    Args:
        tokens: the catalogue's.
        items_NH: item indices, newest last, -1 where a history is shorter.
        max_tokens: the oldest items are left out where a row would be longer.

    Returns:
        ids [L] and lengths [N], int64.
    """
    known = items_NH >= 0
    items = np.where(known, items_NH, 0)
    starts = tokens.offsets[items]
    sizes = np.where(known, tokens.offsets[items + 1] - starts, 0)
    newest_first = np.cumsum(sizes[:, ::-1], axis=1)[:, ::-1]
    sizes = np.where(newest_first <= max_tokens - 2, sizes, 0)
    pool = np.concatenate([tokens.ids, [tokens.prefix, tokens.suffix]])
    one = np.ones((len(items), 1), np.int64)
    sizes = np.concatenate([one, sizes, one], axis=1)
    starts = np.concatenate(
        [one * len(tokens.ids), starts, one * (len(tokens.ids) + 1)], axis=1
    ).ravel()
    flat = sizes.ravel()
    ends = flat.cumsum()
    places = np.arange(ends[-1]) + np.repeat(starts - (ends - flat), flat)
    return torch.from_numpy(pool[places]), torch.from_numpy(sizes.sum(axis=1))


class Reader:
    """The data of one actor's learners, as arrays over all their shards."""

    _at_once = EVALUATION_ROWS

    def __init__(
        self,
        config: RunConfig,
        tokens: Tokens,
        seats: Mapping[str, Sequence[Shard]],
        device: torch.device | None = None,
        own: Own = ALIKE,
    ):
        """Args: seats: learner -> the shards it reads; learners sorted, slot i is the i-th."""
        self._config = config
        self._tokens = tokens
        self._device = device
        self.learners = tuple(seats)
        self.shards = [shard for shards in seats.values() for shard in shards]
        usual, size = config.train.local_samples, config.train.batch_size
        self._samples = [own.samples_of((s.client for s in of), usual) for of in seats.values()]
        self._steps = [-(-samples // size) for samples in self._samples]
        self._slot_of_shard = [s for s, shards in enumerate(seats.values()) for _ in shards]
        readable = [shard.readable() for shard in self.shards]
        bases = np.cumsum([0, *(len(shard.items) for shard in readable)])
        self._items = np.concatenate([shard.items for shard in readable])
        self._first = np.concatenate(
            [
                base + np.repeat(shard.offsets[:-1], np.diff(shard.offsets))
                for base, shard in zip(bases, readable, strict=False)
            ]
        )
        self._shard = np.repeat(np.arange(len(self.shards)), np.diff(bases))
        targets = [b + s.train_targets() for b, s in zip(bases, readable, strict=False)]
        self._targets = [
            np.concatenate(
                [t for t, of in zip(targets, self._slot_of_shard, strict=True) if of == i]
            )
            for i in range(len(self.learners))
        ]
        for learner, targets_M in zip(self.learners, self._targets, strict=True):
            if not len(targets_M):
                raise FellrayError(
                    f"client {learner}: has no history to learn from (a user with two training "
                    "interactions); prepare with fewer clients"
                )

    def samples(self, slot: int) -> int:
        """Histories a learner reads in a round: for each of its shards `train.local_samples`, or
        what that client has of its own."""
        return self._samples[slot]

    def ends(self, step: int) -> list[int]:
        """The slots whose last step of a round this is."""
        return [slot for slot, steps in enumerate(self._steps) if steps == step + 1]

    def steps(self, round: int) -> Iterator[tuple[Batch, Tensor]]:
        """The round's batches of all learners side by side, with each row's target item [N].

        Who has fewer histories to read than others has no row in the last ones.
        """
        size = self._config.train.batch_size
        orders = [self._order(slot, round) for slot in range(len(self.learners))]
        for step in range(max(self._steps)):
            parts = [order[step * size : (step + 1) * size] for order in orders]
            slots = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
            positions = np.concatenate(parts)
            history = self._history(positions)
            target = self._items[positions].astype(np.int64)
            batch = self._batch(slots, self._shard[positions], history, target)
            yield batch, torch.from_numpy(target).to(self._device)

    def held_out(
        self, split: Literal[1, 2], max_users: int | None
    ) -> Iterator[tuple[Batch, list[np.ndarray], list[np.ndarray]]]:
        """Batches of held-out users with the items each has seen and its true next items.

        Args:
            split: 1 validation, 2 test.
            max_users: at most this many users of each shard, the same ones every time.
        """
        width = self._config.model.max_history
        for index, shard in enumerate(self.shards):
            held = shard.held_out(split)
            users = np.arange(len(held.users))
            if max_users is not None and len(users) > max_users:
                users = np.sort(_generator(0, shard.client, split).permutation(users)[:max_users])
            for at in range(0, len(users), self._at_once):
                chosen = users[at : at + self._at_once]
                history = np.full((len(chosen), width), -1, np.int64)
                for row, user in enumerate(chosen):
                    last = held.histories[user][-width:]
                    history[row, width - len(last) :] = last
                slots = np.full(len(chosen), self._slot_of_shard[index])
                batch = self._batch(slots, np.full(len(chosen), index), history, None)
                yield batch, [held.seen[u] for u in chosen], [held.truth[u] for u in chosen]

    def _order(self, slot: int, round: int) -> np.ndarray:
        """Positions a learner reads in a round: its targets shuffled, again and again if few."""
        targets, wanted = self._targets[slot], self.samples(slot)
        draw = _generator(self._config.seed, self.learners[slot], round)
        passes = -(-wanted // len(targets))
        return np.concatenate([draw.permutation(targets) for _ in range(passes)])[:wanted]

    def _history(self, positions: np.ndarray) -> np.ndarray:
        width = self._config.model.max_history
        places = positions[:, None] + np.arange(-width, 0)
        known = places >= self._first[positions, None]
        return np.where(known, self._items[np.maximum(places, 0)], -1)

    def _batch(
        self,
        slots: np.ndarray,
        shards: np.ndarray,
        history_NH: np.ndarray,
        target_N: np.ndarray | None,
    ) -> Batch:
        """Rows of histories. Args: target_N: what they are to lead to; None: nobody learns."""
        model = self._config.model
        ids, lengths = assemble(self._tokens, history_NH, model.max_tokens)
        return Batch(
            torch.from_numpy(slots).to(self._device),
            torch.from_numpy(shards).to(self._device),
            Rows(lengths, model.pad_multiple, self._device),
            ids.to(self._device),
        )


def _generator(seed: int, name: str, counter: int) -> np.random.Generator:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    key = np.random.SeedSequence([seed, int.from_bytes(digest), counter])
    return np.random.Generator(np.random.Philox(key))
