"""Low-rank products for many clients at once, beside one base product for all of them.

Adapters are rows, one for each slot; every product here is a batched one over the lanes of a stack,
so nothing is copied per row of a client, and a client's gradient is one product over its own tokens
in their order. Products are in the tokens' dtype; adapters and their gradients keep their own.
Nothing here knows blocks or clients.

Shapes: S slots, P parameters of one slot's adapters, K lanes, s lanes of one stack, M tokens of all
lanes, i and o widths of a projection, r rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fellray.platform.adapters import Pair, Site, views
from fellray.platform.lanes import Stack


@dataclass(frozen=True)
class Piece:
    """The adapters of one stack at one site."""

    stack: Stack
    slots_s: Tensor
    """Whose each lane is."""
    values: Pair
    """A [S, r, i] and B [S, o, r] of all slots."""
    gradient: Pair | None
    """Of the same shapes; `backpropagate` adds to it."""
    scaling: float


class Loras:
    """One set of adapters for the lanes of a batch."""

    def __init__(
        self,
        sites: Sequence[Site],
        stacks: Sequence[Stack],
        ranks: Sequence[int],
        scaling: Callable[[int], float],
        slots_K: Tensor,
        values_SP: Tensor,
        gradient_SP: Tensor | None = None,
    ):
        """Args: ranks: one for each stack. values_SP: rows of the largest rank, of which a stack
        uses the first components. slots_K: each lane's row in values_SP, and in gradient_SP where a
        gradient is wanted."""
        self.sites: list[list[Piece]] = [[] for _ in sites]
        """Pieces of every site: of the lanes that have it on this side."""
        of_rank_1 = sum(site.num_parameters(1) for site in sites)
        largest = values_SP.shape[1] // max(of_rank_1, 1)
        values = views(values_SP, sites, largest)
        gradient = None if gradient_SP is None else views(gradient_SP, sites, largest)
        for stack, rank in zip(stacks, ranks, strict=True):
            slots_s = slots_K[stack.lanes]
            for at, (site, pieces) in enumerate(zip(sites, self.sites, strict=True)):
                if not site.has(stack.entry):  # in a block before their entry
                    continue
                own = None if gradient is None else _first(gradient[at], rank)
                first = _first(values[at], rank)
                pieces.append(Piece(stack, slots_s, first, own, scaling(rank)))


def add_product(y_Mo: Tensor, x_Mi: Tensor, pieces: Sequence[Piece]) -> None:
    """Add scaling * B (A x) to y, each lane its own."""
    for piece in pieces:
        a, b = _take(piece, x_Mi.dtype)
        low = piece.stack.cut(x_Mi).bmm(a.mT)
        piece.stack.cut(y_Mo).baddbmm_(low, b.mT, alpha=piece.scaling)


def backpropagate(dx_Mi: Tensor, dy_Mo: Tensor, x_Mi: Tensor, pieces: Sequence[Piece]) -> None:
    """Add the low-rank part's input gradient to dx, and those of A and B to their slots."""
    for piece in pieces:
        a, b = _take(piece, x_Mi.dtype)
        x, dy = piece.stack.cut(x_Mi), piece.stack.cut(dy_Mo)
        dlow = dy.bmm(b).mul_(piece.scaling)
        piece.stack.cut(dx_Mi).baddbmm_(dlow, a)
        if piece.gradient:
            da, db = piece.gradient
            da.index_add_(0, piece.slots_s, dlow.mT.bmm(x).to(da.dtype))
            low = x.bmm(a.mT).mul_(piece.scaling)
            db.index_add_(0, piece.slots_s, dy.mT.bmm(low).to(db.dtype))


def _first(pair: Pair, rank: int) -> Pair:
    """The first components of all slots, views."""
    a, b = pair
    return a[:, :rank], b[:, :, :rank]


def _take(piece: Piece, dtype: torch.dtype) -> Pair:
    """Every lane's A and B."""
    a, b = (values.index_select(0, piece.slots_s).to(dtype) for values in piece.values)
    return a, b
