"""The client's side of the model: token ids in, unit vectors out, the trunk somewhere in between.

It does not know where the trunk runs, nor how long it takes: up to the cut is one call, on from it
another.

Shapes: N rows, n rows of one padded length T, L real tokens of all rows together, d width.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fellray.platform.adapters import Pair
from fellray.platform.bank import Bank
from fellray.platform.caches import Cache, Sight, Stretches
from fellray.platform.rows import Rows
from fellray.platform.split import Blocks, Bottom, Parts, Top

Cross = Callable[[Tensor], Tensor]
"""Packed hidden states at the lower cut [L, d] to those at the upper cut [L, d]."""

Used = list[tuple[Tensor, list[Pair]]]
"""Per group of rows its slots [n] and the adapter leaves it used, the bottom's and the top's."""


class Tower:
    """Bottom and top, with a bank that holds both parts' adapters side by side."""

    def __init__(self, bottom: Bottom, top: Top, pad: int, bank: Bank | None, pooled: bool = False):
        """Args: pad: the padding token. bank: the bottom's sites, then the top's; or base only.
        pooled: what comes back from the trunk is rows' means."""
        self._bottom = bottom
        self._top = top
        self._pad = pad
        self._bank = bank
        self._pooled = pooled
        self._split = len(bottom.blocks.adapted) * bottom.blocks.sets

    def encode(
        self, rows: Rows, ids_L: Tensor, slot_N: Tensor, cross: Cross, train: bool
    ) -> tuple[Tensor, Used]:
        """Unit vectors [N, d], where the trunk is at hand; and the adapter leaves."""
        h_Ld, used = self.rise(rows, ids_L, slot_N, train)
        return self.finish(rows, cross(h_Ld), used), used

    def rise(self, rows: Rows, ids_L: Tensor, slot_N: Tensor, train: bool) -> tuple[Tensor, Used]:
        """Packed hidden states at the lower cut [L, d], and the adapter leaves of both parts."""
        used = []
        hidden = []
        for group in rows.groups:
            slots_n = slot_N[group.rows_n]
            pairs = self._bank.gather(slots_n, train) if self._bank else []
            used.append((slots_n, pairs))
            ids = torch.full_like(group.mask_nT, self._pad, dtype=torch.int64)
            ids[group.mask_nT] = ids_L[group.tokens]
            hidden.append(self._climb(ids, group.mask_nT, slots_n, pairs[: self._split]))
        h_Ld = rows.pack(hidden)
        if train and not h_Ld.requires_grad:
            h_Ld.requires_grad_()  # a bottom without adapters: the trunk still wants its gradient
        return h_Ld, used

    def _climb(
        self, ids_nT: Tensor, mask_nT: Tensor, slots_n: Tensor, pairs: Sequence[Pair]
    ) -> Tensor:
        """Hidden states at each row's own lower cut [n, T, d]."""
        if not (self._bank and self._bottom.cuts_differ):
            h: Tensor = self._bottom(
                ids_nT, mask_nT, self._sets(slots_n, pairs, self._bottom.blocks)
            )
            return h
        cuts_n = self._bank.cuts_S[slots_n]
        order, parts = [], []
        for cut in cuts_n.unique().tolist():
            own = (cuts_n == cut).nonzero().squeeze(1)
            mine = [(a[own], b[own]) for a, b in pairs]
            sets = self._sets(slots_n[own], mine, self._bottom.blocks)
            order.append(own)
            parts.append(self._bottom(ids_nT[own], mask_nT[own], sets, cut))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def finish(self, rows: Rows, y_Ld: Tensor, used: Used) -> Tensor:
        """Unit vectors [N, d] from packed hidden states at the upper cut [L, d], or from means."""
        if self._pooled:
            return F.normalize(y_Ld, dim=1)
        vectors = []
        for group, (slots_n, pairs) in zip(rows.groups, used, strict=True):
            sets = self._sets(slots_n, pairs[self._split :], self._top.blocks)
            vectors.append(self._top(rows.pad(y_Ld, group), group.mask_nT, sets))
        order = torch.cat([group.rows_n for group in rows.groups])
        u_nd = torch.cat(vectors)
        return u_nd.new_zeros(u_nd.shape).index_copy(0, order, u_nd)

    def read(self, rows: Rows, y_Ld: Tensor, used: Used) -> Tensor:
        """A decoder's last hidden states [L, d], as its head takes them, from packed ones at the
        upper cut."""
        states = []
        for group, (slots_n, pairs) in zip(rows.groups, used, strict=True):
            sets = self._sets(slots_n, pairs[self._split :], self._top.blocks)
            states.append(self._top(rows.pad(y_Ld, group), group.mask_nT, sets))
        return rows.pack(states)

    def rise_on(
        self, rows: Stretches, ids_L: Tensor, slot_N: Tensor, cache: Cache
    ) -> tuple[Tensor, Used]:
        """`rise` for tokens that follow others; nobody trains by that."""
        used, hidden = [], []
        for stretch in rows.stretches:
            slots_n = slot_N[stretch.rows_n]
            pairs = self._bank.gather(slots_n, False) if self._bank else []
            used.append((slots_n, pairs))
            ids = torch.full_like(stretch.mask_nT, self._pad, dtype=torch.int64)
            ids[stretch.mask_nT] = ids_L[stretch.tokens]
            sets = self._sets(slots_n, pairs[: self._split], self._bottom.blocks)
            sight = Sight(cache, stretch)
            h = self._bottom.embeddings(ids)
            hidden.append(self._bottom.blocks.extend(h, sight, sets, None))
        return rows.pack(hidden), used

    def read_on(self, rows: Stretches, y_Ld: Tensor, used: Used, cache: Cache) -> Tensor:
        """`read` for tokens that follow others."""
        states = []
        head = self._top.head
        assert head
        for stretch, (slots_n, pairs) in zip(rows.stretches, used, strict=True):
            sets = self._sets(slots_n, pairs[self._split :], self._top.blocks)
            sight = Sight(cache, stretch)
            states.append(
                head.norm(self._top.blocks.extend(rows.pad(y_Ld, stretch), sight, sets, None))
            )
        return rows.pack(states)

    def _sets(
        self, slots_n: Tensor, pairs: Sequence[Pair], blocks: Blocks
    ) -> tuple[Sequence[Pair], ...]:
        """A part's adapters, as many sets as each of its projections has adapters."""
        if not self._bank:
            return ()
        scaled, count = self._bank.scale(slots_n, pairs), len(blocks.adapted)
        return tuple(scaled[at * count : (at + 1) * count] for at in range(blocks.sets))


def encode_texts(parts: Parts, rows: Rows, ids_L: Tensor, pad: int) -> Tensor:
    """Unit vectors [N, d] of texts by the whole frozen encoder, no adapters."""

    def cross(h_Ld: Tensor) -> Tensor:
        return run_trunk(parts.trunk, rows, h_Ld)

    tower = Tower(parts.bottom, parts.top, pad, None)
    with torch.no_grad():
        u, _ = tower.encode(rows, ids_L, torch.zeros(len(rows.lengths_N)), cross, train=False)
    return u


def run_trunk(trunk: Blocks, rows: Rows, h_Ld: Tensor) -> Tensor:
    """The frozen trunk on packed hidden states, without adapters."""
    return rows.pack([trunk(rows.pad(h_Ld, g), g.mask_nT, ()) for g in rows.groups])
