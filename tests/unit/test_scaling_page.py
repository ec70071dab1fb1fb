"""The page of a sweep: it tells what the report holds, and nothing from outside gets in."""

import copy
from typing import Any

import pytest

from fellray.platform.scaling_page import render_scaling

ROW = {
    **{"seconds": 2.0, "own": 0.5, "trunk": 0.25, "transfer": 0.25, "queue": 0.5, "slowest": 0.25},
    **{"driver": 0.25, "calls_per_batch": 1.5, "tokens_per_batch": 300.0, "occupancy": 0.018},
    "pss": 600 << 20,
}
POINT: dict[str, Any] = {
    **{"registered": 1000, "sampled": 10, "actors": 3, "nodes": 3, "run": "scale-1"},
    **{"server_s": 5.0, "lag_s": 7.0, "actors_s": 9.0, "capacity_s": 21.0, "training_s": 30.0},
    **{"down_s": 8.0, "client_bytes": 6e5, "sampled_bytes": 6e7, "same_hashes": True},
    **{"cost_per_round": 0.0012, "cost_whole": 0.02, "lost": ["ffff1"], "round": ROW},
    "rounds": [{**ROW, "round": t, "events": ["fit was <lost>"] * (t == 2)} for t in range(4)],
    "nodes_seen": [[0.0, 0], [12.0, 3], [30.0, 2], [36.0, 3], [59.0, 0]],
    "updates": {"asked": 30, "once": 30, "missing": 0, "more": 0, "of_others": 0},
}
REPORT: dict[str, Any] = {
    **{"name": "scale", "nodes": "pretended", "idle_s": 6.0, "cpus": 4, "busy": True},
    **{"load_average": [2.0, 3.0], "rounds": 3, "node_cpus": 1.0, "overrides": []},
    "prices": {"currency": "EUR", "per_hour": {"head": 0.2, "client": 0.4}},
    "points": [POINT, copy.deepcopy(POINT) | {"registered": 10, "lost": []}],
    "dry": {
        **{"registered": 100_000, "sampled": 10, "actors": 3, "nodes": 3, "placed": 3},
        **{"per_actor": 33_334, "register_s": 0.1, "draw_s": 0.0002},
    },
}


@pytest.fixture
def page() -> str:
    return render_scaling(REPORT)


def test_it_says_what_matters_first(page: str) -> None:
    assert "60 of 60 updates of sampled clients were counted exactly once" in page
    assert "2 of 2 ended with the adapters of the same training without Ray" in page
    assert "1 node lost" in page
    assert "The nodes are pretended" in page
    assert "The machine was busy" in page
    assert "1,000 / 10 / 3 / 3" in page
    assert "EUR a round" in page
    assert "100,000 clients" in page
    assert "nothing was trained" in page


def test_what_went_wrong_is_seen() -> None:
    report = copy.deepcopy(REPORT)
    report["points"][0] |= {"same_hashes": False, "down_s": None}
    report["points"][0]["updates"] |= {"once": 29, "missing": 1}
    page = render_scaling(report)
    assert "59 of 60 updates" in page
    assert "1 of 2 ended" in page
    assert "<td>NO</td>" in page


def test_a_real_cluster_and_a_calm_machine_need_no_caution() -> None:
    page = render_scaling(REPORT | {"nodes": "cluster", "busy": False, "dry": None})
    assert "pretended: processes" not in page
    assert "busy" not in page
    assert "Dry" not in page


def test_it_is_safe_and_always_the_same(page: str) -> None:
    assert "fit was &lt;lost&gt;" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page == render_scaling(copy.deepcopy(REPORT))
