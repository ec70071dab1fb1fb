"""How long a probe waits for places, and what a plan says of nodes that are not there."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from fellray.actors.world import survey
from fellray.jobs import plan as plans
from fellray.jobs import probe as probes
from fellray.jobs.probe import run_probe
from fellray.platform.capacity import Layout, Node
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.places import Demand

Configure = Callable[..., RunConfig]


@pytest.mark.parametrize("wait_s", [0.0, 60.0])
def test_a_probe_waits_for_nodes_as_its_run_would(
    wait_s: float, tiny_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []

    def open_pool(kind: type, rows: Any, demand: Demand, note: Any, wait_s: float) -> Any:
        heard.append((demand.name, demand.count, wait_s))
        if demand.name == "client":
            raise FellrayError("as far as this goes")
        return SimpleNamespace(handles=[None], close=lambda: heard.append("closed"))

    monkeypatch.setattr(probes, "RayPool", open_pool)
    monkeypatch.setattr(probes, "Shared", lambda name, value: value)
    monkeypatch.setattr(probes, "check_places", lambda demands: heard.append("checked"))
    cluster = {"address": "auto", "wait_for_nodes_s": wait_s}
    config = tiny_config(cluster=cluster, server={"count": 2}, clients={"per_actor": 1})
    with pytest.raises(FellrayError, match="as far as this goes"):
        run_probe(config, survey(config))
    first = [] if wait_s else ["checked"]
    assert heard == [*first, ("server", 1, wait_s), ("client", 1, wait_s), "closed"]


@pytest.fixture
def small_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node, and nothing measured on it."""
    found = SimpleNamespace(probe=None, gpu_bytes=0.0)
    node = Node("worker", 1, 1, 0, 2**40)
    monkeypatch.setattr(plans, "connect", lambda config, actors: nullcontext())
    monkeypatch.setattr(plans, "run_probe", lambda config, world: found)
    monkeypatch.setattr(plans, "_read_cluster", lambda: [node])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_refusal_says_that_only_present_nodes_were_counted(
    tiny_config: Configure, small_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> Layout:
        raise FellrayError("it does not fit")

    monkeypatch.setattr(plans, "lay_out", refuse)
    for cluster, words in (
        ({"address": "auto"}, "it does not fit; counted are the nodes that are there now, none"),
        ({"address": "auto", "wait_for_nodes_s": 9}, "`fellray train` waits for the others"),
    ):
        with pytest.raises(FellrayError, match=words):
            plans.plan(tiny_config(cluster=cluster, clients={"per_actor": 1}))


def test_auto_and_the_plan_say_it_too(
    tiny_config: Configure,
    small_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = Layout(5, 1, 5, (), 1, 1, 1, 1, "the cores", 1, 1, "as it happens")
    monkeypatch.setattr(plans, "lay_out", lambda *given: layout)
    config = tiny_config(cluster={"address": "auto"}, clients={"per_actor": "auto"})
    assert plans.settle(config, survey(config)).clients.per_actor == 5
    assert "counted are the nodes that are there now" in " ".join(capsys.readouterr().out.split())
    plans.show_plan(config, *plans.plan(config))
    assert "counted are the nodes that are there now" in " ".join(capsys.readouterr().out.split())
    here = config.model_copy(update={"cluster": tiny_config().cluster})
    plans.show_plan(here, layout, plans.count_work(here, survey(here)))
    assert "counted" not in capsys.readouterr().out
