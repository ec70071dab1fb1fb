"""Replicas that no node can hold are refused in words, and not waited for without end."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from fellray.actors.session import ray
from fellray.jobs import room
from fellray.jobs.room import await_room, find_held, find_missing
from fellray.platform.errors import FellrayError
from fellray.serve.args import Args

Nodes = list[Mapping[str, float]]


def args(**settings: Any) -> Args:
    return Args(run="runs/demo", **settings)


@pytest.mark.parametrize(
    ("settings", "nodes", "missing"),
    [
        pytest.param({}, [{"CPU": 2.0}], "", id="room for both"),
        pytest.param(
            {"trunk_gpus": 1},
            [{"CPU": 4.0}],
            "trunks=1 cpus=1 trunk_gpus=1: 0 of 1 replicas find a place; each asks for 1 CPU and "
            "1 GPU, and the nodes have 4 CPU and 0 GPU",
            id="no GPU",
        ),
        pytest.param(
            {"cpus": 16},
            [{"CPU": 8.0}, {"CPU": 8.0}],
            "recommenders=1 cpus=16 recommender_gpus=0: 0 of 1 replicas find a place; each asks "
            "for 16 CPU and 0 GPU, and the nodes have 8 CPU and 0 GPU + 8 CPU and 0 GPU",
            id="larger than any node",
        ),
        pytest.param(
            {"recommenders": 3, "recommender_gpus": 0.5, "cpus": 0},
            [{"CPU": 1.0, "GPU": 1.0}],
            "recommenders=3 cpus=0 recommender_gpus=0.5: 2 of 3 replicas find a place; each asks "
            "for 0 CPU and 0.5 GPU, and the nodes have 1 CPU and 1 GPU",
            id="too many",
        ),
        pytest.param(
            {"trunk_gpus": 1},
            [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}],
            "",
            id="the CPU beside the GPU is for who needs the GPU",
        ),
    ],
)
def test_what_is_missing(settings: dict[str, Any], nodes: Nodes, missing: str) -> None:
    assert find_missing(args(**settings), nodes) == missing


def stand_on(monkeypatch: pytest.MonkeyPatch, nodes: Nodes, comes: bool) -> list[Any]:
    """A cluster of these nodes; what is asked of its autoscaler."""
    asked: list[Any] = []

    def ask(bundles: Any, strategy: str) -> Any:
        def wait(seconds: float) -> bool:
            asked.append(seconds)
            return comes

        asked.append(bundles)
        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": n} for n in nodes])
    monkeypatch.setattr(ray, "available_resources", lambda: nodes[0])
    monkeypatch.setattr(ray.util, "placement_group", ask)
    monkeypatch.setattr(ray.util, "remove_placement_group", lambda group: asked.append("given up"))
    return asked


def test_on_this_machine_no_node_will_come(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_on(monkeypatch, [{"CPU": 4.0}], comes=True)
    await_room(args(), nodes_may_come=False)
    with pytest.raises(FellrayError, match=r"^trunks=1 .*; ask for less, or serve where"):
        await_room(args(trunk_gpus=1), nodes_may_come=False)
    assert asked == []


@pytest.mark.parametrize("comes", [True, False])
def test_on_a_cluster_nodes_are_waited_for_and_not_for_ever(
    comes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = stand_on(monkeypatch, [{"CPU": 4.0}], comes)
    await_room(args(), nodes_may_come=True)
    assert asked == []
    if comes:
        await_room(args(trunk_gpus=1, cpus=0), nodes_may_come=True)
    else:
        with pytest.raises(FellrayError, match=r"^trunks=1 cpus=0 .*, after 600 s too; ask"):
            await_room(args(trunk_gpus=1, cpus=0), nodes_may_come=True)
    # who asks for nothing has a place anywhere
    assert asked == [[{"GPU": 1.0}], room.NODES_S, "given up"]
    assert "are waited for 600 s" in capsys.readouterr().out


def test_room_that_others_hold_is_waited_for_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_on(monkeypatch, [{"CPU": 4.0}], comes=False)
    await_room(args(), nodes_may_come=True)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    await_room(args(), nodes_may_come=True)
    assert capsys.readouterr().out == (
        "the replicas ask for 2 CPU and 0 GPU, and others hold all but 1 CPU and 0 GPU; it is "
        "waited for without end, and Ctrl-C ends that\n"
    )
    # Ray leaves out what is used up
    assert find_held(args(), {}).endswith("others hold all but 0 CPU and 0 GPU")
    assert find_held(args(cpus=0), {}) == ""
