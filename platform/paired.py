"""Paired tests: whether one method's values are above another's by more than chance would have it.

It must not know methods or runs: it takes numbers in pairs.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9_999


def weigh_signs(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the mean difference under random signs of the differences.

    Exact where there are few enough pairs, else from `RESAMPLES` seeded draws. What pairs share
    (a seed, a client) makes them less than independent, and p then too small.
    """
    assert len(first) == len(second)
    differences = np.asarray(first, float) - np.asarray(second, float)
    if len(differences) < 2 or not differences.any():
        return 1.0
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def adjust(values: Sequence[float]) -> list[float]:
    """Holm's adjustment of several p values, in their order (Holm 1979)."""
    adjusted, running = [0.0] * len(values), 0.0
    for rank, at in enumerate(np.argsort(values, kind="stable").tolist()):
        running = max(running, min(1.0, (len(values) - rank) * values[at]))
        adjusted[at] = running
    return adjusted
