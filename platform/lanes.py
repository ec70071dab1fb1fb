"""Lanes: rows of many clients as one flat tensor for the base model's products.

A lane is one client's rows of one message, one behind the other, padded at its end only. Its length
is a rule on that client's rows alone, and every lane starts at a multiple of `STEP`, so a product
over all lanes gives each the bits it would have alone. Lanes of one length and one rank lie side by
side: a stack, which batched products take without copying. Lanes may enter a run of blocks at
different ones; who enters earlier lies first, so those who are in at a block are the first so many
tokens. It knows nothing of what blocks or clients are.

Shapes: N rows, L real tokens, K lanes, M computed tokens (lanes with their padding), X tokens of
rows padded one by one for attention, n rows of one padded length T, d width.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from fellray.platform.rows import padded_length

STEP = 8
"""Lane lengths are multiples of this, at least `rows.SHORTEST`: products of other row counts take
other kernels at their edges, with other bits."""


@dataclass(frozen=True)
class Stack:
    """Lanes of one length, rank and cut, side by side."""

    lanes: slice
    """Which lanes, in the order of `Lanes`."""
    start: int
    """Their first token of M."""
    tokens: int
    """Length of each."""
    rank: int
    entry: int = 0
    """The block at which they enter, where that differs."""

    def cut(self, x_Md: Tensor) -> Tensor:
        """The stack's tokens [lanes, tokens, d], a view."""
        count = self.lanes.stop - self.lanes.start
        end = self.start + count * self.tokens
        return x_Md[self.start : end].view(count, self.tokens, x_Md.shape[1])


@dataclass(frozen=True)
class Heap:
    """Rows of one padded length, for attention."""

    start: int
    """Their first token of X."""
    mask_nT: Tensor
    """True at real tokens."""
    entry: int = 0
    """As of a stack."""

    def cut(self, x_Xd: Tensor) -> Tensor:
        """The heap's rows [n, T, d], a view."""
        n, length = self.mask_nT.shape
        return x_Xd[self.start : self.start + n * length].view(n, length, x_Xd.shape[1])


class Lanes:
    """Where every token of a batch lies."""

    def __init__(
        self,
        lengths_N: Tensor,
        lane_N: Tensor,
        multiple: int,
        ranks_K: Tensor,
        device: torch.device | None = None,
        entry_K: Tensor | None = None,
    ):
        """Args, all int64 on the CPU: lengths_N: real tokens per row. lane_N: each row's lane,
        from 0. multiple: a row's padding rule for attention. ranks_K: each lane's rank. entry_K:
        the block at which each enters, where that differs."""
        num_lanes = len(ranks_K)
        tokens_K = torch.zeros(num_lanes, dtype=torch.int64).index_add_(0, lane_N, lengths_N)
        size_K = padded_length(tokens_K, STEP)
        entry_K = torch.zeros_like(ranks_K) if entry_K is None else entry_K
        entry_N = entry_K[lane_N]
        order_K = _rank_by(entry_K, size_K, ranks_K)
        self.order_K = order_K
        """The lanes as they lie: lane order_K[i] of the caller is the i-th here."""
        sizes, ranks, entries = size_K[order_K], ranks_K[order_K], entry_K[order_K]
        ends = sizes.cumsum(0)
        self.num_tokens = int(ends[-1])
        start_K = torch.empty_like(size_K).index_copy_(0, order_K, ends - sizes)
        self.stacks = _stack(sizes, ranks, entries)

        in_order = lane_N.argsort(stable=True)
        lengths, owner = lengths_N[in_order], lane_N[in_order]
        before = lengths.cumsum(0) - lengths
        before_lane = (tokens_K.cumsum(0) - tokens_K)[owner]
        row_start_N = torch.empty_like(lengths_N).index_copy_(
            0, in_order, start_K[owner] + before - before_lane
        )
        token = torch.arange(int(lengths_N.sum()))
        packed_start = lengths_N.cumsum(0) - lengths_N
        within = token - packed_start.repeat_interleave(lengths_N)
        place_L = row_start_N.repeat_interleave(lengths_N) + within

        padded_N = padded_length(lengths_N, multiple)
        self.heaps: list[Heap] = []
        row_start_X = torch.empty_like(lengths_N)
        index, start = [], 0
        for entry, length in torch.stack([entry_N, padded_N], 1).unique(dim=0).tolist():
            rows = ((entry_N == entry) & (padded_N == length)).nonzero().squeeze(1)
            offset = torch.arange(length)
            mask = offset < lengths_N[rows, None]
            self.heaps.append(Heap(start, mask.to(device), entry))
            index.append((row_start_N[rows, None] + offset * mask).flatten())
            row_start_X[rows] = start + torch.arange(len(rows)) * length
            start += mask.numel()
        source_M = torch.zeros(self.num_tokens, dtype=torch.int64)
        source_M[place_L] = row_start_X.repeat_interleave(lengths_N) + within
        empty_M = torch.ones(self.num_tokens, dtype=torch.bool)
        empty_M[place_L] = False
        empty_X = torch.cat([~heap.mask_nT.cpu().flatten() for heap in self.heaps])
        to_X = torch.cat(index)
        self._same = torch.equal(to_X, torch.arange(self.num_tokens))
        """Rows as long as their padding, one in each lane: nothing is to be moved."""
        self._entered: dict[int, Lanes] = {}
        self._place_L = place_L.to(device)
        self._to_X = (to_X.to(device), empty_X.nonzero().squeeze(1).to(device))
        self._to_M = (source_M.to(device), empty_M.nonzero().squeeze(1).to(device))

    def entered(self, block: int) -> "Lanes":
        """Those that are in at a block; they lie as they do here."""
        if all(stack.entry <= block for stack in self.stacks):
            return self
        if block not in self._entered:
            self._entered[block] = self._first(
                [stack for stack in self.stacks if stack.entry <= block],
                [heap for heap in self.heaps if heap.entry <= block],
            )
        return self._entered[block]

    def _first(self, stacks: Sequence[Stack], heaps: list[Heap]) -> "Lanes":
        first = copy(self)
        first.stacks, first.heaps = stacks, heaps
        first.num_tokens = sum((s.lanes.stop - s.lanes.start) * s.tokens for s in stacks)
        padded = sum(heap.mask_nT.numel() for heap in heaps)
        first._to_X = _cut(self._to_X, padded)
        first._to_M = _cut(self._to_M, first.num_tokens)
        return first

    def spans(self) -> list[tuple[int, int]]:
        """Every lane's first token of M and the one behind its last, in their order here."""
        return [
            (start, start + stack.tokens)
            for stack in self.stacks
            for start in range(
                stack.start,
                stack.start + (stack.lanes.stop - stack.lanes.start) * stack.tokens,
                stack.tokens,
            )
        ]

    def spread(self, packed_Ld: Tensor) -> Tensor:
        """Packed tokens in their lanes [M, d], zeros at padding."""
        flat = packed_Ld.new_zeros(self.num_tokens, packed_Ld.shape[1])
        return flat.index_copy_(0, self._place_L, packed_Ld)

    def collect(self, flat_Md: Tensor) -> Tensor:
        """The real tokens [L, d], row after row as they came."""
        return flat_Md.index_select(0, self._place_L)

    def pad(self, flat_Md: Tensor) -> Tensor:
        """Rows padded one by one [X, d], zeros at padding; `Heap.cut` finds them. What is given
        may be what is answered."""
        return flat_Md if self._same else _take(flat_Md, *self._to_X)

    def unpad(self, padded_Xd: Tensor) -> Tensor:
        """The inverse of `pad` [M, d], zeros at the lanes' padding."""
        return padded_Xd if self._same else _take(padded_Xd, *self._to_M)


def _take(x: Tensor, index: Tensor, empty: Tensor) -> Tensor:
    return x.index_select(0, index).index_fill_(0, empty, 0.0)


def _cut(places: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """What `_take` needs for the first so many."""
    index, empty = places
    return index[:count], empty[empty < count]


def _rank_by(*keys_K: Tensor) -> Tensor:
    """The order by several keys, the first counts most."""
    order = torch.arange(len(keys_K[0]))
    for key_K in reversed(keys_K):
        order = order[key_K[order].argsort(stable=True)]
    return order


def _stack(sizes: Tensor, ranks: Tensor, entries: Tensor) -> Sequence[Stack]:
    """Runs of equal (length, rank, entry)."""
    kinds, counts = torch.stack([sizes, ranks, entries], 1).unique_consecutive(
        dim=0, return_counts=True
    )
    stacks, lane, start = [], 0, 0
    for (tokens, rank, entry), count in zip(kinds.tolist(), counts.tolist(), strict=True):
        stacks.append(Stack(slice(lane, lane + count), start, tokens, rank, entry))
        lane += count
        start += count * tokens
    return stacks
