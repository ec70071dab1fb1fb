"""What a run shows to Ray's metrics: names, and a row of metrics.jsonl as numbers."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fellray.actors import server as actors_server
from fellray.actors import telemetry
from fellray.actors.server import Server
from fellray.actors.session import metrics
from fellray.actors.telemetry import NAMES, ROUND_GAUGES, ServerTelemetry, read_row
from fellray.platform.batcher import Served
from fellray.platform.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "grafana/fellray.json").read_text(encoding="utf-8"))
ROW = {
    "round": 3,
    "seconds": 8.5,
    "bytes": 30,
    "bytes_by_kind": {"loss": 30},
    "loss": 4.25,
    "losses": {"a": 4.0, "b": 4.5, "c": None},
    "samples_per_second": 20.0,
    "refused": {"c": "training loss is nan"},
    "late": ["d", "e"],
    "validation": {"ndcg@10": 0.5, "recall@10": 0.75},
    "worst_ndcg@10": 0.25,
}


def test_the_dashboard_asks_for_what_is_shown_and_nothing_else() -> None:
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked += [str(one.get("query")) for one in DASHBOARD["templating"]["list"]]
    found = {name for text in asked for name in re.findall(r"ray_(fellray_\w+)", text)}
    assert found == set(NAMES)


def test_names_are_distinct_and_counters_end_as_prometheus_wants() -> None:
    assert len(set(NAMES)) == len(NAMES)
    counters = {telemetry.BYTES, *telemetry.BATCH_COUNTERS}
    assert {name for name in NAMES if name.endswith("_total")} == counters


def test_a_row_becomes_every_gauge() -> None:
    values = read_row(ROW, rounds=9, registered=12)
    assert values == {
        "fellray_round": 3,
        "fellray_rounds": 9,
        "fellray_round_seconds": 8.5,
        "fellray_histories_per_second": 20,
        "fellray_clients_dormant": 7,
        "fellray_clients_asked": 5,
        "fellray_clients_accepted": 2,
        "fellray_clients_late": 2,
        "fellray_clients_refused": 1,
        "fellray_loss": 4.25,
        "fellray_ndcg_at_10": 0.5,
        "fellray_worst_client_ndcg_at_10": 0.25,
    }
    assert values.keys() == ROUND_GAUGES.keys()


def test_what_a_round_does_not_have_is_left_as_it_was() -> None:
    start = {"round": 0, "seconds": 1.0, "bytes": 0, "bytes_by_kind": {}}
    assert read_row(start, 9, 12) == {
        "fellray_round": 0,
        "fellray_rounds": 9,
        "fellray_round_seconds": 1,
    }
    assert "fellray_loss" not in read_row(ROW | {"loss": None}, 9, 12)


class Noted:
    """Stands for a Ray metric."""

    def __init__(self, name: str, *_: Any):
        self.values: list[float] = []
        SEEN[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> "Noted":
        assert tags == {"run": "demo"}
        return self

    def inc(self, value: float) -> None:
        assert value > 0, "a counter of Ray refuses the rest"
        self.values.append(value)

    def set(self, value: float) -> None:
        self.values.append(value)


SEEN: dict[str, Noted] = {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> ServerTelemetry:
    SEEN.clear()
    monkeypatch.setattr(metrics, "Counter", Noted)
    monkeypatch.setattr(metrics, "Gauge", Noted)
    return ServerTelemetry("demo")


def test_the_server_counts_batches_of_tokens(server: ServerTelemetry) -> None:
    server.count(Served(requests=3, size=700, waited_s=0.5, busy_s=0.25))
    server.count(Served(requests=1, size=0, waited_s=9.0, busy_s=9.0))
    server.count(Served(requests=1, size=100, waited_s=0.0, busy_s=0.25))
    assert {name: sum(SEEN[name].values) for name in telemetry.BATCH_COUNTERS} == {
        "fellray_server_batches_total": 2,
        "fellray_server_requests_total": 4,
        "fellray_server_tokens_total": 800,
        "fellray_server_queue_seconds_total": 0.5,
        "fellray_server_busy_seconds_total": 0.5,
    }


def test_the_server_counts_who_has_begun_a_round_once(server: ServerTelemetry) -> None:
    server.begin(1, ("a", "b"))
    server.begin(1, ("b", "c"))
    server.begin(2, ("a",))
    assert SEEN[telemetry.ACTIVE].values == [2, 3, 1]


def test_nobody_is_active_when_a_round_is_installed(server: ServerTelemetry) -> None:
    server.begin(1, ("a", "b"))
    server.rest()
    server.begin(1, ("a",))  # again
    assert SEEN[telemetry.ACTIVE].values == [2, 0, 1]


def test_a_server_says_when_nobody_trains_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Heard:
        """Stands for the telemetry, the batcher and the host."""

        def __init__(self, *_: Any):
            self.call = self.result = self.count = lambda *_: self

        def __getattr__(self, name: str) -> Any:
            return lambda *_: said.append(name)

    async def at_once(call: Any) -> Any:
        return call

    monkeypatch.setattr(actors_server, "ServerTelemetry", Heard)
    monkeypatch.setattr(actors_server, "Batcher", Heard)
    monkeypatch.setattr(asyncio, "wrap_future", at_once)
    one = Server(RunConfig(), (), None, None)  # type: ignore[arg-type]  # nothing is computed
    for call, wanted in (
        (one.begin("run", 1, ("a",)), ["begin"]),
        (one.install(None), ["rest"]),  # type: ignore[arg-type]
        (one.forget(), ["rest"]),
    ):
        said.clear()
        asyncio.run(call)
        assert said == wanted


def test_what_each_server_has_is_added_up_and_shares_are_averaged() -> None:
    asked = {target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
    assert f'sum by (run) (ray_{telemetry.ACTIVE}{{run=~"$run"}})' in asked
    (share,) = [one for one in asked if "busy_seconds" in one]
    assert share.startswith("avg by (run)")
