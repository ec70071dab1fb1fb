"""How many actors find a place on nodes: small exact cases."""

import math

import pytest

from fellray.actors.pool import check_places
from fellray.actors.session import ray
from fellray.platform import config as configs
from fellray.platform.errors import FellrayError
from fellray.platform.places import Demand, pack, read_demands


def node(cpus: float, gpus: float = 0.0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": 1e9}


@pytest.mark.parametrize(
    ("demands", "nodes", "placed"),
    [
        pytest.param([Demand("client", 3, 1, 0)], [], [0], id="no node"),
        pytest.param([Demand("client", 3, 1, 0)], [{"memory": 1e9}], [0], id="a node of nothing"),
        pytest.param([Demand("client", 3, 1, 0)], [node(2)], [2], id="too few CPUs"),
        pytest.param([Demand("client", 3, 1, 0)], [node(2), node(2)], [3], id="over two nodes"),
        pytest.param([Demand("client", 4, 1.5, 0)], [node(2), node(2)], [2], id="no half actors"),
        pytest.param([Demand("client", 10, 0, 0.1)], [node(1, 1)], [10], id="tenths add up to one"),
        pytest.param([Demand("client", 11, 0, 0.1)], [node(1, 1)], [10], id="and no further"),
        pytest.param([Demand("client", 6, 0, 1 / 3)], [node(1, 2)], [6], id="thirds of two GPUs"),
        pytest.param([Demand("client", 4, 1, 0.25)], [node(8)], [0], id="no GPU at all"),
        pytest.param([Demand("client", 9, 0, 0)], [node(0)], [9], id="nothing asked"),
        pytest.param([Demand("client", 9, 3, 0)], [node(math.inf)], [9], id="no end of CPUs"),
        pytest.param(
            [Demand("server", 1, 1, 0.5), Demand("client", 8, 0.5, 0.1)],
            [node(4, 1)],
            [1, 5],
            id="the server first",
        ),
        pytest.param(
            [Demand("server", 1, 3, 0), Demand("client", 4, 1, 0)],
            [node(2), node(4)],
            [1, 3],
            id="a gap is filled",
        ),
    ],
)
def test_pack(demands: list[Demand], nodes: list[dict[str, float]], placed: list[int]) -> None:
    assert pack(demands, nodes) == dict(zip([d.name for d in demands], placed, strict=True))


def test_pack_leaves_the_nodes_alone() -> None:
    nodes = [node(2)]
    pack([Demand("client", 2, 1, 0)], nodes)
    assert nodes == [node(2)]


def test_what_a_run_asks_for() -> None:
    config = configs.parse(
        {"server": {"count": 2, "cpus": 3, "gpus": 0.5}, "clients": {"gpu_denominator": 4}}, "test"
    )
    assert read_demands(config, 7) == (
        Demand("server", 2, 3, 0.5),
        Demand("client", 7, 0.5, 0.25),
    )
    assert read_demands(configs.parse({}, "test"), 1)[1].gpus == 0


@pytest.mark.parametrize(
    ("waited_s", "way_out"),
    [
        (0.0, r"let an autoscaler bring nodes \(cluster.wait_for_nodes_s\)$"),
        (90.0, "give the autoscaler longer than the 90 s that it had"),
    ],
)
def test_who_has_waited_is_not_told_to_wait(
    waited_s: float, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"Alive": True, "Resources": node(0)}
    monkeypatch.setattr(ray, "nodes", lambda: [there, {**there, "Alive": False}])
    with pytest.raises(FellrayError, match=way_out):
        check_places([Demand("client", 2, 1, 0)], waited_s)
