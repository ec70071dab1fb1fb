"""A layout that does not fit is refused at once, in words a person can act on."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from driver import wait_until

from fellray.actors import pool
from fellray.actors.pool import RayPool
from fellray.actors.session import ray
from fellray.jobs.train import train
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.places import Demand
from fellray.platform.storage import Storage

CLUSTER = pytest.mark.cluster

Configure = Callable[..., RunConfig]


@CLUSTER
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param(
            {"clients": {"per_actor": 2, "gpu_denominator": 4}},
            [
                "3 client actors of 0.5 CPU and 0.25 GPU",
                "1 server actors of 1 CPU and 0 GPU",
                "0 GPU;",
                "0 of 3 client",
                "1 of 1 server",
                "clients.gpu_denominator",
            ],
            id="a GPU where there is none",
        ),
        pytest.param(
            {"server": {"cpus": 1000}},
            ["1 server actors of 1000 CPU", "0 of 1 server", "server.cpus"],
            id="too large a server",
        ),
        pytest.param(
            {"clients": {"cpus": 4, "per_actor": 1}},
            ["5 client actors of 4 CPU", "of 5 client", "clients.per_actor", "clients.cpus"],
            id="too many clients",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    settings: dict[str, Any], words: list[str], tiny_config: Configure, local_ray: None
) -> None:
    config = tiny_config(**settings)
    began = time.monotonic()
    with pytest.raises(FellrayError) as refusal:
        train(config)
    assert time.monotonic() - began < 20
    assert [word for word in words if word not in str(refusal.value)] == []
    run = Storage(config.storage).sub(config.name)
    assert run.list("rounds") == []
    with run.lock("train"):
        pass


@CLUSTER
def test_nodes_are_waited_for(local_ray: None) -> None:
    """As long as `cluster.wait_for_nodes_s` says, for an autoscaler."""

    class Idle:
        """An actor that only waits."""

    began = time.monotonic()
    with pytest.raises(FellrayError, match="0 of 1 client"):
        RayPool(Idle, [()], Demand("client", 1, 0, 1), print, wait_s=1.5)
    assert 1.5 <= time.monotonic() - began < 10


@CLUSTER
def test_taken_places_are_told_apart_from_missing_ones(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's actors hold what we ask for: the wait ends, and nothing of ours stays."""

    class Idle:
        """An actor that only holds its place."""

    wait_until(all_free, 60, "earlier actors have gone")
    cpus = ray.cluster_resources()["CPU"]
    others = RayPool(Idle, [()], Demand("other", 1, cpus, 0), print)
    try:
        monkeypatch.setattr(pool, "START_S", 1.0)
        with pytest.raises(FellrayError, match="1 of 1 client actors did not start") as refusal:
            RayPool(Idle, [()], Demand("client", 1, 1, 0), print)
        assert "asks for 1 CPU and 0 GPU" in str(refusal.value)
        assert "free now is 0 CPU" in str(refusal.value)
    finally:
        others.close()
    wait_until(all_free, 60, "all is given back, and the actor that waited does not start")


def all_free() -> bool:
    return ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
