"""Tallies: exact percentiles, errors by kind."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fellray.jobs.tally import OK, count_load, find_quantile


def test_percentiles_are_values_that_were_seen() -> None:
    hundred = [float(value) for value in range(1, 101)]
    assert [find_quantile(hundred, p) for p in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert find_quantile([1.0, 2.0, 3.0], 0.5) == 2
    assert find_quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2
    assert find_quantile([7.0], 0.01) == 7
    assert find_quantile(hundred * 10, 0.001) == 1


@given(st.lists(st.floats(0, 10), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_least_that_covers_its_share(values: list[float], p: int) -> None:
    values.sort()
    found = find_quantile(values, p / 100)
    assert sum(value <= found for value in values) * 100 >= p * len(values)
    assert sum(value < found for value in values) * 100 < p * len(values)


def test_errors_are_counted_and_not_timed() -> None:
    fates = [OK, "timeout", OK, "status 503", "timeout"]
    tally = count_load([0.010, 20.0, 0.030, 0.001, 20.0], fates, 2.0, 0.5)
    assert (tally.sent, tally.answered, tally.throughput) == (5, 2, 1.0)
    assert tally.errors == {"status 503": 1, "timeout": 2}
    assert tally.latency_ms == pytest.approx(
        {"p50": 10, "p90": 30, "p99": 30, "max": 30, "mean": 20}
    )
    none = count_load([], [], 1.0, 0.0)
    assert (none.latency_ms, none.throughput) == ({}, 0.0)
    assert math.isfinite(none.throughput)
