"""Arrivals: a Poisson process, Zipf's law, and the same again from the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fellray.jobs.arrivals import draw_owners, draw_times, weigh_zipf


def test_times_are_a_poisson_process() -> None:
    times = draw_times(200, 50, 0)
    assert (np.diff(times) > 0).all()
    assert times[0] > 0
    assert times[-1] < 50
    # 10,000 on average, standard deviation 100
    assert abs(len(times) - 10_000) < 500
    counts = np.histogram(times, 50, (0, 50))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.6)
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)


@given(rate=st.floats(0.5, 200), seconds=st.floats(0.01, 5), seed=st.integers(0, 99))
def test_the_same_seed_the_same_times(rate: float, seconds: float, seed: int) -> None:
    times = draw_times(rate, seconds, seed)
    assert np.array_equal(times, draw_times(rate, seconds, seed))
    assert ((times >= 0) & (times < seconds)).all()


def test_other_seeds_other_times() -> None:
    assert not np.array_equal(draw_times(50, 1, 0)[:5], draw_times(50, 1, 1)[:5])


def test_zipf_weights() -> None:
    np.testing.assert_allclose(weigh_zipf(3, 1.0), np.array([6, 3, 2]) / 11)
    np.testing.assert_allclose(weigh_zipf(4, 0.0), np.full(4, 0.25))


def test_owners_follow_the_weights() -> None:
    weights = weigh_zipf(50, 1.1)
    owners = draw_owners(100_000, weights, 0)
    assert owners.min() == 0
    assert owners.max() == 49
    found = np.bincount(owners, minlength=50) / len(owners)
    np.testing.assert_allclose(found, weights, atol=0.01)
    assert np.array_equal(owners[:100], draw_owners(100, weights, 0))
    assert not np.array_equal(owners[:100], draw_owners(100, weights, 1))
