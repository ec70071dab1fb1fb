"""What a replica looks back on: rates and quantiles, exact, of the routes that are asked about."""

import time

import pytest

from fellray.serve import counters
from fellray.serve.counters import WINDOW_S, Counters


def test_a_minute_is_looked_back_on() -> None:
    held = Counters()
    assert held.recent("/v1/recommend").p50_s is None
    for milliseconds in range(1, 101):
        held.count("POST", "/v1/recommend", 200, milliseconds / 1000)
    held.count("GET", "/v1/runs", 200, 9.0)
    recent = held.recent("/v1/recommend")
    assert (recent.requests, recent.p50_s, recent.p99_s) == (100, 0.05, 0.099)
    assert 0 < recent.window_s < 5
    late = held.recent("/v1/recommend", time.monotonic() + WINDOW_S + 1)
    assert (late.requests, late.window_s) == (0, WINDOW_S)
    one = Counters()
    one.count("POST", "/v1/recommend/batch", 200, 0.25)
    assert (one.recent("/v1/recommend").p50_s, one.recent("/v1/recommend").p99_s) == (0.25, 0.25)


def test_where_less_is_remembered_the_window_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_REMEMBERED", 4)
    held = Counters()
    began = time.monotonic()
    for _ in range(9):
        held.count("POST", "/v1/recommend", 200, 0.1)
    recent = held.recent("/v1/recommend", began + 10)
    assert recent.requests == 4
    assert 9 < recent.window_s <= 10
