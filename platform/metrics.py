"""Full-ranking metrics of one client, their pooling over clients, and how even clients fare.

Knows scores and item indices only: not the model that made the scores, not rounds, not files.

Definitions are RecBole's (Recall, NDCG, MRR, Hit at K) under FELLRec's protocol: all items are
candidates, seen items are masked, a user's truth is a set, users without truth are skipped.

Shapes: U users, I items, K places of the longest list (at most I).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import numpy as np
import torch

CUTOFFS = (5, 10, 20)

# A user's value is rounded to a multiple of 2**-32 (an error below 1.2e-10). Sums of such values
# are exact in float64 up to 2**21 users, hence equal in any order, in any chunks, on any device.
_GRID = 2.0**32


@dataclass(frozen=True)
class Score:
    """What a client tells about its users' rankings: sums, so that clients can be added.

    Adding is exact, so the order of clients does not change one bit (up to 2**21 users in all).

    A client never sends which items it recommended, only how many distinct ones. Coverage pooled
    over clients is therefore the mean of the clients' coverages weighted by their users, not the
    coverage of the union of their lists.
    """

    users: int
    """Users with at least one truth item."""
    items: int
    """Catalogue size; the same for all clients."""
    sums: dict[str, float]
    """`recall@10` and the like -> sum over users."""
    distinct: dict[str, int]
    """`coverage@10` and the like -> sum over clients of users times distinct items recommended."""

    def __add__(self, other: "Score") -> "Score":
        """The score of both clients' users together."""
        assert self.items == other.items, "scores over different catalogues cannot be added"
        assert self.sums.keys() == other.sums.keys()
        return Score(
            users=self.users + other.users,
            items=self.items,
            sums={name: value + other.sums[name] for name, value in self.sums.items()},
            distinct={name: count + other.distinct[name] for name, count in self.distinct.items()},
        )

    def means(self) -> dict[str, float]:
        """Each metric averaged over users, in [0, 1]; empty where there are no users."""
        if not self.users:
            return {}
        means = {name: value / self.users for name, value in self.sums.items()}
        reach = self.users * self.items
        return means | {name: count / reach for name, count in self.distinct.items()}


class Evaluator:
    """Collects one client's rankings, chunk of users after chunk, into one `Score`."""

    def __init__(self, items: int) -> None:
        """`items`: catalogue size."""
        assert items > 0
        self._items = items
        self._users = 0
        self._sums = {
            f"{metric}@{k}": 0.0 for metric in ("recall", "ndcg", "mrr", "hit") for k in CUTOFFS
        }
        self._recommended = {k: np.zeros(items, dtype=bool) for k in CUTOFFS}

    def add(
        self, scores_UI: torch.Tensor, seen: Sequence[np.ndarray], truth: Sequence[np.ndarray]
    ) -> None:
        """Rank all items for U users and add them.

        Args:
            scores_UI: any float type, any device; higher is better. Equal scores are ranked by
                item index, the smaller first.
            seen: per user, indices of items not to recommend. A truth item stays a candidate.
            truth: per user, indices of relevant items. Repeats count once; a user without any
                is skipped.

        Raises:
            ValueError: a score is NaN.
        """
        users, items = scores_UI.shape
        assert items == self._items
        assert len(seen) == len(truth) == users
        if bool(scores_UI.isnan().any()):
            raise ValueError("scores hold NaN: such users cannot be ranked")
        kept = [user for user, relevant in enumerate(truth) if len(relevant)]
        if not kept:
            return
        if len(kept) < users:
            scores_UI = scores_UI[kept]
            seen, truth = [seen[user] for user in kept], [truth[user] for user in kept]

        truth_UI = _mark(truth, scores_UI)
        masked_UI = _mark(seen, scores_UI) & ~truth_UI
        top_UK = _rank(scores_UI, masked_UI)
        listed_UK = ~masked_UI.gather(1, top_UK)
        hits_UK = truth_UI.gather(1, top_UK).cpu().double()
        self._sum(hits_UK, truth_UI.sum(1).cpu())
        top, listed = top_UK.cpu().numpy(), listed_UK.cpu().numpy()
        for k, recommended_I in self._recommended.items():
            recommended_I[top[:, :k][listed[:, :k]]] = True

    def miss(self, truth: Sequence[np.ndarray]) -> None:
        """Add users to whom nothing was recommended: each metric of theirs is 0.

        Args:
            truth: as of `add`.
        """
        self._users += sum(len(relevant) > 0 for relevant in truth)

    def _sum(self, hits_UK: torch.Tensor, relevant_U: torch.Tensor) -> None:
        users, width = hits_UK.shape
        places_K = torch.arange(1, width + 1, dtype=torch.float64)
        gains_K = 1 / torch.log2(places_K + 1)
        dcg_UK = (hits_UK * gains_K).cumsum(1)
        ideal_K = gains_K.cumsum(0)
        found_UK = hits_UK.cumsum(1)
        # The first hit is the only one with exactly one hit found so far.
        first_UK = hits_UK * (found_UK == 1) / places_K
        for k in CUTOFFS:
            last = min(k, width) - 1
            per_user = {
                "recall": found_UK[:, last] / relevant_U,
                "ndcg": dcg_UK[:, last] / ideal_K[relevant_U.clamp(max=last + 1) - 1],
                "mrr": first_UK[:, : last + 1].sum(1),
                "hit": (found_UK[:, last] > 0).double(),
            }
            for metric, value_U in per_user.items():
                self._sums[f"{metric}@{k}"] += float((value_U * _GRID).round().sum()) / _GRID
        self._users += users

    def score(self) -> Score:
        """The score of everything added so far."""
        return Score(
            users=self._users,
            items=self._items,
            sums=dict(self._sums),
            distinct={
                f"coverage@{k}": self._users * int(recommended_I.sum())
                for k, recommended_I in self._recommended.items()
            },
        )


def score(
    scores_UI: torch.Tensor, seen: Sequence[np.ndarray], truth: Sequence[np.ndarray]
) -> Score:
    """The score of one client whose users come in one piece; see `Evaluator.add`.

    Raises:
        ValueError: a score is NaN.
    """
    evaluator = Evaluator(scores_UI.shape[1])
    evaluator.add(scores_UI, seen, truth)
    return evaluator.score()


def balance(per_client: Mapping[str, float]) -> dict[str, float]:
    """How evenly clients fare in one metric where higher is better (FELLRec's imbalance).

    Returns:
        `mean`; `std` (population); `cv` (std / mean, 0 where the mean is 0); `min`;
        `worst_decile` (mean of the lowest 10 % of clients, rounded up); `max_min` (highest minus
        lowest); `jain` ((sum x)**2 / (n * sum x**2), from 1/n to 1, and 1 where all are 0).
        The order of clients changes nothing.
    """
    assert per_client, "balance needs at least one client"
    values = sorted(per_client.values())
    mean, std = fmean(values), pstdev(values)
    worst = values[: -(-len(values) // 10)]
    squares = math.fsum(value * value for value in values)
    return {
        "mean": mean,
        "std": std,
        "cv": std / mean if mean else 0.0,
        "min": values[0],
        "worst_decile": fmean(worst),
        "max_min": values[-1] - values[0],
        "jain": math.fsum(values) ** 2 / (len(values) * squares) if squares else 1.0,
    }


def _mark(indices: Sequence[np.ndarray], like_UI: torch.Tensor) -> torch.Tensor:
    """True at each user's indices; bool, on the device and of the shape of `like_UI`."""
    marks_UI = torch.zeros(like_UI.shape, dtype=torch.bool, device=like_UI.device)
    lengths = [len(row) for row in indices]
    columns = np.concatenate(indices).astype(np.int64)
    assert columns.size == 0 or 0 <= columns.min() <= columns.max() < like_UI.shape[1]
    rows = np.repeat(np.arange(len(lengths)), lengths)
    device = like_UI.device
    marks_UI[torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)] = True
    return marks_UI


def _rank(scores_UI: torch.Tensor, masked_UI: torch.Tensor) -> torch.Tensor:
    """The first K items of each user, ties by item index, masked items behind all others."""
    width = min(max(CUTOFFS), scores_UI.shape[1])
    open_UI = scores_UI.masked_fill(masked_UI, -torch.inf)
    best_UK, top_UK = open_UI.topk(width, dim=1)
    last_U1 = best_UK[:, -1:]

    # topk picks among ties as it likes. Where the last place is tied it may have picked the wrong
    # items: those rows are sorted whole. Elsewhere it has the right items, in doubtful order.
    tied_U = ((open_UI >= last_U1).sum(1) > width) | (last_U1[:, 0] == -torch.inf)
    top_UK = top_UK.sort(dim=1).values
    order_UK = open_UI.gather(1, top_UK).sort(dim=1, descending=True, stable=True).indices
    top_UK = top_UK.gather(1, order_UK)
    rows = tied_U.nonzero()[:, 0]
    if len(rows):
        order_RI = open_UI[rows].sort(dim=1, descending=True, stable=True).indices
        # An open item may score -inf as well; the second sort puts it before the masked ones.
        behind_RI = masked_UI[rows].gather(1, order_RI).to(torch.uint8).sort(dim=1, stable=True)
        top_UK[rows] = order_RI.gather(1, behind_RI.indices)[:, :width]
    return top_UK
