"""Paired tests: whether one method's values are above another's by more than chance would have it.

It must not know methods or runs: it takes numbers in pairs.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9_999


def weigh_signs(differences: Sequence[float]) -> float:
    """Two-sided p of the mean difference of pairs under random signs of the differences.

    Exact where there are few enough pairs, else from `RESAMPLES` seeded draws. Pairs must be
    independent: what several of them share makes p too small.
    """
    found = np.asarray(differences, float)
    if len(found) < 2 or not found.any():
        return 1.0
    tested = stats.permutation_test(
        (found,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(tested.pvalue)


def lowest_p(pairs: int) -> float:
    """What `weigh_signs` finds at least, where all differences have one sign."""
    return max(2.0 ** (1 - max(pairs, 1)), 1 / (RESAMPLES + 1))


def adjust(values: Sequence[float]) -> list[float]:
    """Holm's adjustment of several p values, in their order (Holm 1979)."""
    adjusted, running = [0.0] * len(values), 0.0
    for rank, at in enumerate(np.argsort(values, kind="stable").tolist()):
        running = max(running, min(1.0, (len(values) - rank) * values[at]))
        adjusted[at] = running
    return adjusted
