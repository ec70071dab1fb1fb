"""Keys and values of texts in writing, so that a new token costs one token.

A row's cache may be another row's of the step before (a beam goes on), and is bounded together with
all others: what is dropped is computed again from the tokens. Whose texts they are is not known
here, nor where they are kept: client and server have the same caches for blocks of their own.

Shapes: N rows, n rows of one group, T new tokens of a row padded, C tokens that a row's cache is
read to, h heads of keys, e width of a head, L new tokens of all rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fellray.platform.rows import Group, Rows, padded_length


@dataclass(frozen=True)
class Stretch(Group):
    """The rows of one padded length of new tokens, and one of all tokens."""

    held_n: Tensor
    """Tokens before the new ones, int64."""
    position_nT: Tensor
    """The new tokens' places in their rows."""
    sees_nTC: Tensor
    """What each may look at: itself and what is before it."""


class Stretches(Rows):
    """New tokens of rows that go on. A row's padded lengths are rules on that row alone."""

    def __init__(
        self, held_N: Tensor, lengths_N: Tensor, multiple: int, device: torch.device | None = None
    ):
        """Args, int64 on the CPU: held_N: tokens before. lengths_N: new ones. multiple: as of
        `Rows`."""
        super().__init__(lengths_N, multiple, device)
        self.held_N = held_N
        padded_N = padded_length(lengths_N, multiple)
        room_N = padded_length(held_N + padded_N, multiple)
        starts_N = lengths_N.cumsum(0) - lengths_N
        self.stretches: list[Stretch] = []
        for length, room in torch.stack([padded_N, room_N], 1).unique(dim=0).tolist():
            rows = ((padded_N == length) & (room_N == room)).nonzero().squeeze(1)
            place = torch.arange(length)
            mask = place < lengths_N[rows, None]
            tokens = (starts_N[rows, None] + place)[mask]
            position = held_N[rows, None] + place
            sees = torch.arange(room) <= position[:, :, None]
            parts = (rows, mask, tokens, held_N[rows], position, sees)
            self.stretches.append(Stretch(*(part.to(device) for part in parts)))
        self.groups = list(self.stretches)


class Cache:
    """Keys and values of N rows in some blocks."""

    def __init__(self, num_rows: int):
        self.lengths_N = torch.zeros(num_rows, dtype=torch.int64)
        """Tokens of each row, on the CPU."""
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def follow(self, parent_N: Tensor) -> None:
        """Row i becomes a copy of what row parent_N[i] was; rows may come, go and repeat."""
        if torch.equal(parent_N, torch.arange(len(self.lengths_N))):
            return
        self.lengths_N = self.lengths_N[parent_N]
        self._held = {
            block: (
                k.index_select(0, parent_N.to(k.device)),
                v.index_select(0, parent_N.to(v.device)),
            )
            for block, (k, v) in self._held.items()
        }

    def add(
        self, block: int, stretch: Stretch, k_nhTe: Tensor, v_nhTe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values of some rows behind their earlier ones.

        What stands behind a row's last token is of no meaning and gets overwritten.

        Returns:
            All keys and values of these rows [n, h, C, e].
        """
        room = stretch.sees_nTC.shape[2]
        held = self._fit(block, room, k_nhTe, v_nhTe)
        rows_n = stretch.rows_n
        for all_NhCe, new_nhTe in zip(held, (k_nhTe, v_nhTe), strict=True):
            all_NhCe[rows_n[:, None], :, stretch.position_nT] = new_nhTe.transpose(1, 2)
        if len(rows_n) == len(self.lengths_N):  # in their order: a view does
            return held[0][:, :, :room], held[1][:, :, :room]
        return held[0][rows_n, :, :room], held[1][rows_n, :, :room]

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return sum(k.nbytes + v.nbytes for k, v in self._held.values())

    def _fit(self, block: int, room: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        old = self._held.get(block)
        if old is None or old[0].shape[2] < room:
            rows = len(self.lengths_N)
            k, v = (t.new_zeros(rows, t.shape[1], room, t.shape[3]) for t in new)
            if old is not None:
                k[:, :, : old[0].shape[2]] = old[0]
                v[:, :, : old[1].shape[2]] = old[1]
            self._held[block] = (k, v)
        return self._held[block]


@dataclass(frozen=True)
class Sight:
    """A cache as some of its rows see it; transformers' blocks take it for one of theirs."""

    cache: Cache
    stretch: Stretch

    def update(self, k_nhTe: Tensor, v_nhTe: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See `Cache.add`; a block is known by its place in the whole model."""
        return self.cache.add(layer_idx, self.stretch, k_nhTe, v_nhTe)


class Caches:
    """Caches by name within a budget of bytes, the longest unused dropped first."""

    def __init__(self, budget: int):
        """Args: budget: bytes; 0 keeps nothing."""
        self._budget = budget
        self._held: dict[str, Cache] = {}

    @property
    def used(self) -> int:
        """Bytes held."""
        return sum(cache.nbytes for cache in self._held.values())

    def take(self, name: str) -> Cache | None:
        """A cache, which is its caller's from now on; None where there is none."""
        return self._held.pop(name, None)

    def put(self, name: str, cache: Cache) -> None:
        """Keep a cache, as the last to be dropped; one that is larger than all room is not kept."""
        self._held.pop(name, None)
        self._held[name] = cache
        used = self.used
        while used > self._budget:
            used -= self._held.pop(next(iter(self._held))).nbytes

    def clear(self) -> None:
        """Drop all."""
        self._held.clear()
