"""The page of a bench: whole, of one file, and honest about goals."""

from dataclasses import asdict
from typing import Any

from fellray.jobs.bench_serve import Turns
from fellray.jobs.load_figures import judge
from fellray.jobs.load_page import write_load_page
from fellray.jobs.load_settings import Settings


def make_results(**more: Any) -> dict[str, Any]:
    def turns(*throughput: float) -> dict[str, Any]:
        share, cpu = [0.25] * len(throughput), [3.0] * len(throughput)
        return asdict(Turns(list(throughput), cpu, share, {}, [9.0] * len(throughput)))

    latency = {"p50": 10.0, "p90": 20.0, "p99": 90.0, "max": 99.0, "mean": 12.0}
    row = {
        "share": 0.7,
        "rate": 35.0,
        "throughput": 34.0,
        "latency_ms": latency,
        "errors": {"status 503": 2},
        "percentiles_ms": [float(p) for p in range(1, 100)],
    }
    counted = {"p99_ms": [8.0], "hit_rate": [0.75], "errors": {}, "sent": 9}
    results = {
        "run": "runs/<demo>",
        "cores": 2,
        "users": 1000,
        "clients": 8,
        "settings": asdict(Settings()),
        "tokens": {"median": 57.0, "low": 40.0, "high": 78.0, "count": 9},
        "one_forward_ms": {"median": 10.0, "low": 9.0, "high": 11.0, "count": 3},
        "arms": {
            "service": turns(60.0, 45.0, 50.0),
            "bare loop": {**turns(100.0, 90.0, 100.0), "generator_share": []},
            "unbatched": turns(50.0, 40.0, 25.0),
            "no-op": turns(500.0),
            "stock no-op": turns(100.0),
            "roomy stock no-op": turns(50.0),
        },
        "open_loops": [row, {**row, "rate": 45.0, "share": 0.85}],
        "adapters": [
            {"clients": 64, "throughput": [40.0], **counted},
            {"clients": 4096, "throughput": [30.0], **counted},
        ],
        "load_average": [1.0, 2.0],
        "busy": True,
    }
    results["figures"] = judge(results)
    return results | more


def test_ratios_are_taken_turn_by_turn() -> None:
    figures = {one["name"]: one for one in make_results()["figures"]}
    bare = figures["service / bare loop"]
    assert (bare["ratio"]["median"], bare["met"]) == (0.5, False)
    without = figures["the same without the generator's CPU"]
    assert abs(without["ratio"]["median"] - 0.5 / 0.75) < 1e-9
    assert figures["service / unbatched"]["ratio"]["median"] == 1.2
    assert not figures["no-op / stock no-op"]["met"]
    assert figures["no-op / roomy stock no-op"]["met"]
    assert figures["p99 at 70 % / one forward"]["ratio"]["median"] == 9.0
    assert figures["p99 at 70 % / one forward"]["met"]
    assert figures["4096 adapters / 64"] == {
        "name": "4096 adapters / 64",
        "ratio": {"median": 0.75, "low": 0.75, "high": 0.75, "count": 1},
        "goal": [">=", 0.5],
        "met": True,
    }


def test_the_page_needs_nothing_from_outside_and_escapes() -> None:
    page = write_load_page(make_results())
    assert page.startswith("<!doctype html>")
    assert "runs/&lt;demo&gt; under load" in page
    assert "<demo>" not in page
    for outside in ("http://", "https://", "src=", "<script", "url("):
        assert outside not in page
    for said in (
        "busy",
        "2 status 503",
        "4,096",
        "75%",
        "missed",
        "57 tokens",
        "requests a second",
    ):
        assert said in page


def test_a_service_that_ran_already_has_no_ratios() -> None:
    results = make_results(figures=[], adapters=[])
    del results["tokens"]
    page = write_load_page(results)
    assert "Ratios" not in page
    assert "bare loop ranks" not in page
