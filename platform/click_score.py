"""How well clicks are foretold: AUC, AUC per user, log loss, precision, calibration.

A client tells how many of its clicks and other samples fell into each of 4,096 equal bins of
probability, not which. All pooled metrics but the log loss are taken of the bins: a pair in one bin
counts half for the AUC. This file must not know the model, nor rounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BINS = 4096
"""Of probability, all equally wide."""
CALIBRATION = 10
"""Wider bins, of which the expected calibration error is taken."""

# sums of multiples of 2**-32 are exact, so that no order of clients changes a bit
_GRID = 2.0**32


@dataclass(frozen=True)
class ClickScore:
    """What is told of the samples of one user, or of several; scores can be added."""

    bins: np.ndarray
    """int32, ascending: the bins that hold anything."""
    clicks: np.ndarray
    """int64: clicked samples in each of them."""
    others: np.ndarray
    """int64: the others."""
    log_loss: float
    """Sum over samples."""
    users: int
    """Users with samples."""
    ranked: int
    """Samples of users who have clicked and others; only they have an AUC of their own."""
    ranked_auc: float
    """Their users' AUC, exact, each times its samples, summed."""

    def __add__(self, other: "ClickScore") -> "ClickScore":
        """The score of both's samples together."""
        bins, place = np.unique(np.concatenate([self.bins, other.bins]), return_inverse=True)
        counts = np.zeros((2, len(bins)), np.int64)
        for row, pair in zip(
            counts, ((self.clicks, other.clicks), (self.others, other.others)), strict=True
        ):
            np.add.at(row, place, np.concatenate(pair))
        return ClickScore(
            bins,
            counts[0],
            counts[1],
            self.log_loss + other.log_loss,
            self.users + other.users,
            self.ranked + other.ranked,
            self.ranked_auc + other.ranked_auc,
        )

    def means(self) -> dict[str, float]:
        """The metrics by name; those that the samples do not define are left out.

        `auc`: of all samples pooled. `gauc`: users' AUC, weighted by their samples. `log_loss`.
        `precision`: that of clicks and of others at 0.5, each weighted by how many there are.
        `calibration`: mean probability over the share of clicks. `ece`: expected calibration error.
        """
        clicks, others = int(self.clicks.sum()), int(self.others.sum())
        total = clicks + others
        if not total:
            return {}
        found = {"log_loss": self.log_loss / total}
        if clicks and others:
            below = np.cumsum(self.others) - self.others
            won = float((self.clicks * (below + 0.5 * self.others)).sum())
            found["auc"] = won / (clicks * others)
        if self.ranked:
            found["gauc"] = self.ranked_auc / self.ranked
        yes = self.bins >= BINS // 2
        precision = 0.0
        for side, right, share in ((yes, self.clicks, clicks), (~yes, self.others, others)):
            said = int((self.clicks + self.others)[side].sum())
            precision += share / total * (int(right[side].sum()) / said if said else 0.0)
        found["precision"] = precision
        middle = (self.bins + 0.5) / BINS
        expected = middle * (self.clicks + self.others)
        if clicks:
            found["calibration"] = float(expected.sum()) / clicks
        wide = self.bins * CALIBRATION // BINS
        gaps = np.bincount(wide, expected - self.clicks, CALIBRATION)
        found["ece"] = float(np.abs(gaps).sum()) / total
        return found

    def reliability(self) -> list[dict[str, float]]:
        """Of each of `CALIBRATION` bins of probability that holds samples: `foretold`, their mean
        probability; `clicked`, the share of clicks; `samples`."""
        wide = self.bins * CALIBRATION // BINS
        total = self.clicks + self.others
        samples = np.bincount(wide, total, CALIBRATION)
        foretold = np.bincount(wide, (self.bins + 0.5) / BINS * total, CALIBRATION)
        clicked = np.bincount(wide, self.clicks, CALIBRATION)
        return [
            {
                "foretold": float(foretold[at] / samples[at]),
                "clicked": float(clicked[at] / samples[at]),
                "samples": int(samples[at]),
            }
            for at in np.flatnonzero(samples).tolist()
        ]


NOTHING = ClickScore(
    np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64), 0.0, 0, 0, 0.0
)
"""The score of no samples."""


def score_users(
    logits_N: np.ndarray, labels_N: np.ndarray, user_N: np.ndarray, users: int
) -> list[ClickScore]:
    """One score per user.

    Args:
        logits_N: of each sample.
        labels_N: 1 where it was clicked, else 0.
        user_N: whose it is, 0..users-1, ascending.
        users: how many; who has no samples has a score of none.
    """
    logit = logits_N.astype(np.float64)
    clicked = labels_N.astype(bool)
    loss = np.logaddexp(0.0, np.where(clicked, -logit, logit))
    loss = np.round(np.minimum(loss, 1e4) * _GRID) / _GRID
    probability = 1.0 / (1.0 + np.exp(-np.clip(logit, -500, 500)))
    bin_N = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    key, place = np.unique(user_N.astype(np.int64) * BINS + bin_N, return_inverse=True)
    clicks = np.bincount(place, clicked, len(key)).astype(np.int64)
    others = np.bincount(place, ~clicked, len(key)).astype(np.int64)
    bounds = np.searchsorted(key, np.arange(users + 1) * BINS)
    losses = np.bincount(user_N, loss, users)
    counts = np.bincount(user_N, minlength=users)
    auc = _auc_of_users(logit, clicked, user_N, users)
    scores = []
    for user, (a, b) in enumerate(pairwise(bounds)):
        if not counts[user]:
            scores.append(NOTHING)
            continue
        ranked = 0 if math.isnan(auc[user]) else int(counts[user])
        weighted = float(np.round(auc[user] * ranked * _GRID) / _GRID) if ranked else 0.0
        bins = (key[a:b] - user * BINS).astype(np.int32)
        scores.append(
            ClickScore(bins, clicks[a:b], others[a:b], float(losses[user]), 1, ranked, weighted)
        )
    return scores


def pool_clicks(scores: Sequence[ClickScore]) -> ClickScore:
    """All scores as one."""
    dense = np.zeros((2, BINS), np.int64)
    for one in scores:
        dense[0, one.bins] += one.clicks
        dense[1, one.bins] += one.others
    held = np.flatnonzero(dense.any(0))
    return ClickScore(
        held.astype(np.int32),
        dense[0, held],
        dense[1, held],
        math.fsum(one.log_loss for one in scores),
        sum(one.users for one in scores),
        sum(one.ranked for one in scores),
        math.fsum(one.ranked_auc for one in scores),
    )


def _auc_of_users(
    logit_N: np.ndarray, clicked_N: np.ndarray, user_N: np.ndarray, users: int
) -> np.ndarray:
    """Each user's exact AUC by mean ranks; NaN where all samples are of one kind."""
    order = np.lexsort((logit_N, user_N))
    user, value, clicked = user_N[order], logit_N[order], clicked_N[order]
    starts = np.searchsorted(user, np.arange(users))
    rank = np.arange(len(user)) - starts[user] + 1.0
    new = np.ones(len(user), bool)
    new[1:] = (user[1:] != user[:-1]) | (value[1:] != value[:-1])
    tie = np.cumsum(new) - 1
    ties = int(tie[-1]) + 1 if len(tie) else 0
    rank = (np.bincount(tie, rank, ties) / np.maximum(np.bincount(tie, minlength=ties), 1))[tie]
    clicks = np.bincount(user, clicked, users)
    others = np.bincount(user, ~clicked, users)
    won = np.bincount(user, rank * clicked, users) - clicks * (clicks + 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        result: np.ndarray = np.where(clicks * others > 0, won / (clicks * others), np.nan)
    return result
