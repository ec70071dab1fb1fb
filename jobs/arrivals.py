"""Arrivals: when requests come, and whose they are. The same seed gives the same arrivals.

It must not know what is asked, nor how.
"""

import numpy as np


def draw_times(rate: float, seconds: float, seed: int) -> np.ndarray:
    """A Poisson process: float64, ascending, in seconds from the start, all below `seconds`.

    Args:
        rate: requests a second on average.
    """
    draw = np.random.default_rng([seed, 0])
    times = np.empty(0)
    at = 0.0
    while at < seconds:
        gaps = draw.exponential(1 / rate, 64 + int(rate * (seconds - at)))
        times = np.concatenate([times, at + gaps.cumsum()])
        at = float(times[-1])
    kept: np.ndarray = times[times < seconds]
    return kept


def weigh_zipf(count: int, exponent: float) -> np.ndarray:
    """How often each of `count` is drawn, float64, sums to 1: the k-th in proportion to
    1 / k ** exponent; exponent 0: all alike."""
    weights = np.arange(1, count + 1) ** -float(exponent)
    shares: np.ndarray = weights / weights.sum()
    return shares


def draw_owners(count: int, weights: np.ndarray, seed: int) -> np.ndarray:
    """Whose each of `count` requests is: int64 places in `weights`."""
    draw = np.random.default_rng([seed, 1])
    # by the inverse of the distribution: a longer run begins like a shorter one
    found: np.ndarray = np.searchsorted(weights.cumsum(), draw.random(count), side="right")
    last: np.ndarray = np.minimum(found, len(weights) - 1)
    return last
