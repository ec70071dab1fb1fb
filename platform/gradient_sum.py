"""Gradients of many clients' adapters, added up. It must not know what becomes of them.

Shapes: S slots (clients), s slots asked for, N rows of a step, P parameters of one client, r rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fellray.platform.adapters import Pair, Site, views


class GradientSum:
    """Gradients of S slots, added up row by row.

    Row order is the order of summation, so a slot's bits do not depend on other slots' rows.
    """

    def __init__(
        self, sites: Sequence[Site], r: int, num_slots: int, device: torch.device | None = None
    ):
        size = sum(site.num_parameters(r) for site in sites)
        self.total_SP = torch.zeros(num_slots, size, device=device)
        self._sites = sites
        self._views = views(self.total_SP, sites, r)

    def add(self, slots_N: Tensor, pairs: Sequence[Pair]) -> None:
        """Add the leaves' gradients [N, ...] to their slots."""
        for site, leaves, totals in zip(self._sites, pairs, self._views, strict=True):
            for leaf, total in zip(leaves, totals, strict=True):
                if leaf.grad is None:  # on the other side for all of these rows
                    assert site.cuts is not None
                    continue
                total.index_add_(0, slots_N, leaf.grad)

    def drop_a(self, slots_s: Tensor) -> None:
        """Forget what A's gradients came to."""
        for a, _ in self._views:
            a[slots_s] = 0.0
