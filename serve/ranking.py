"""The best items of each user among those that may be recommended; equal scores by item.

It must not know where scores come from. Shapes: N users, I items, K places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """One user's best items, best first."""

    items: np.ndarray
    """int64 [K], indices of items"""
    scores: np.ndarray
    """float32 [K]"""


@dataclass(frozen=True)
class Choice:
    """Which items may be recommended, and how many are."""

    k: int
    only: np.ndarray | None = None
    """Indices of items; None: all."""
    without: np.ndarray | None = None
    """Indices of items that are left out of those."""


def rank(scores_NI: Tensor, choices: Sequence[Choice]) -> list[Ranking]:
    """Each user's ranking; shorter than k where fewer items are left. Scores are finite."""
    scores_NI = scores_NI.clone()
    for scores_I, choice in zip(scores_NI, choices, strict=True):
        if choice.only is not None:
            kept = torch.from_numpy(choice.only).to(scores_I.device)
            inside = scores_I[kept]
            scores_I.fill_(-torch.inf)
            scores_I[kept] = inside
        if choice.without is not None:
            scores_I[torch.from_numpy(choice.without).to(scores_I.device)] = -torch.inf
    width = min(max(choice.k for choice in choices), scores_NI.shape[1])
    best_NK, top_NK = scores_NI.topk(width, dim=1)
    # among equals topk takes whom it likes: where the last place is shared, the row is sorted whole
    shared_N = (scores_NI >= best_NK[:, -1:]).sum(1) > width
    top_NK = top_NK.sort(dim=1).values
    order = scores_NI.gather(1, top_NK).sort(dim=1, descending=True, stable=True).indices
    top_NK = top_NK.gather(1, order)
    rows = shared_N.nonzero().squeeze(1)
    if len(rows):
        whole = scores_NI[rows].sort(dim=1, descending=True, stable=True).indices
        top_NK[rows] = whole[:, :width]
    best = scores_NI.gather(1, top_NK).cpu().numpy()
    top = top_NK.cpu().numpy()
    rankings = []
    for items, scores, choice in zip(top, best, choices, strict=True):
        left = min(choice.k, int(np.isfinite(scores).sum()))
        rankings.append(Ranking(items[:left].copy(), scores[:left].copy()))
    return rankings
