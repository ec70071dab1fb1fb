"""Low-rank products for many clients at once, beside one base product for all of them.

Adapters of a batch are rows, one for each lane; every product here is a batched one over the lanes
of a stack, so nothing is copied per row of a client, and a client's gradient is one product over
its own tokens in their order. Nothing here knows blocks or clients.

Shapes: K lanes, P parameters of one lane's adapters, s lanes of one stack, M tokens of all lanes,
m of one lane, i and o widths of a projection, r rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fellray.platform.adapters import Pair, Site, views
from fellray.platform.lanes import Stack


@dataclass(frozen=True)
class Piece:
    """The adapters of one stack at one site."""

    stack: Stack
    values: Pair
    """A [s, r, i] and B [s, o, r]."""
    gradient: Pair | None
    """Of the same shapes, written by `backpropagate`."""
    scaling: float


class Loras:
    """One set of adapters for the lanes of a batch."""

    def __init__(
        self,
        sites: Sequence[Site],
        stacks: Sequence[Stack],
        ranks: Sequence[int],
        scaling: Callable[[int], float],
        values_KP: Tensor,
        gradient_KP: Tensor | None = None,
    ):
        """Args: ranks: one for each stack; a lane's row may be longer than its rank needs.
        gradient_KP: zeros, where a gradient is wanted."""
        self.sites: list[list[Piece]] = [[] for _ in sites]
        """Pieces of every site."""
        for stack, rank in zip(stacks, ranks, strict=True):
            size = sum(site.num_parameters(rank) for site in sites)
            cuts = [
                None if flat is None else views(flat[stack.lanes, :size], sites, rank)
                for flat in (values_KP, gradient_KP)
            ]
            for at, pieces in enumerate(self.sites):
                values, gradient = (None if pairs is None else pairs[at] for pairs in cuts)
                assert values is not None
                pieces.append(Piece(stack, values, gradient, scaling(rank)))


def add_product(y_Mo: Tensor, x_Mi: Tensor, pieces: Sequence[Piece]) -> None:
    """Add scaling * B (A x) to y, each lane its own."""
    for piece in pieces:
        a, b = piece.values
        low = piece.stack.cut(x_Mi).bmm(a.mT)
        piece.stack.cut(y_Mo).baddbmm_(low, b.mT, alpha=piece.scaling)


def backpropagate(dx_Mi: Tensor, dy_Mo: Tensor, x_Mi: Tensor, pieces: Sequence[Piece]) -> None:
    """Add the low-rank part's input gradient to dx, and write the gradients of A and B."""
    for piece in pieces:
        a, b = piece.values
        x, dy = piece.stack.cut(x_Mi), piece.stack.cut(dy_Mo)
        dlow = dy.bmm(b)
        if piece.gradient:
            da, db = piece.gradient
            da.baddbmm_(dlow.mT, x, beta=0, alpha=piece.scaling)
            db.baddbmm_(dy.mT, x.bmm(a.mT), beta=0, alpha=piece.scaling)
        piece.stack.cut(dx_Mi).baddbmm_(dlow, a, alpha=piece.scaling)
