"""A plan beside the run it is for: what a probe foretells, what it refuses, what `auto` settles."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fellray.actors.session import ray
from fellray.jobs import cli
from fellray.jobs import plan as plans
from fellray.jobs.plan import plan
from fellray.jobs.process_tree import Watch
from fellray.jobs.train import train
from fellray.platform import config as configs
from fellray.platform.capacity import Layout, Workload
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.journal import Journal
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
MEMORY, BYTES = 1.5, 1.3
"""How far a plan may be from the run, as a factor."""

GIB = 2**30

Configure = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs on this machine decides no test."""
    monkeypatch.setattr(plans, "read_memory", lambda root: (64 * GIB, 64 * GIB))


def rows(config: RunConfig) -> list[dict[str, Any]]:
    return Journal(Storage(config.storage).sub(config.name)).rows("metrics")


def near(foretold: float, seen: float, factor: float) -> bool:
    return seen / factor <= foretold <= seen * factor


@pytest.fixture(scope="module")
def foretold(tiny_config: Configure, local_ray: None) -> tuple[RunConfig, Layout, Workload]:
    """A config, and what is foretold of it."""
    config = tiny_config(name="planned", clients={"per_actor": 3}, evaluation={"every": 1})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plans, "read_memory", lambda root: (64 * GIB, 64 * GIB))
        layout, work = plan(config)
    assert Storage(config.storage).list() == [], "the probe leaves nothing"
    return config, layout, work


@pytest.mark.long
def test_a_plan_is_near_the_run(foretold: tuple[RunConfig, Layout, Workload]) -> None:
    config, layout, work = foretold
    assert (layout.per_actor, layout.actors, layout.side_by_side) == (3, 2, 3)
    held = [entry["valid"] for entry in Dataset(config.data.path).manifest["clients"].values()]
    assert (work.clients, work.asked, work.steps) == (5, 5, 3)
    assert work.users == sum(min(5, users) for users in held)
    (share,) = layout.shares
    with Watch(os.getpid(), every_s=0.2) as watch:
        train(config)
    _, *trained = rows(config)
    assert near(share.bytes, watch.peak_bytes, MEMORY), (share, watch.peak_bytes)
    crossed = sum(row["bytes"] for row in trained) / len(trained)
    assert near(layout.training_bytes + layout.validation_bytes, crossed, BYTES), (layout, crossed)
    assert layout.round_s > 0  # how long it takes is the machine's, and no test's


@pytest.mark.long
def test_the_command_says_how_much_and_why(
    foretold: tuple[RunConfig, Layout, Workload], capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout, work = foretold
    capsys.readouterr()
    plans.show_plan(config, layout, work)
    shown = " ".join(capsys.readouterr().out.split())
    wanted = ("5 clients", "3 (clients.per_actor)", "this machine", "MiB", "training waits for")
    assert [words for words in wanted if words not in shown] == []


@pytest.mark.long
def test_a_plan_without_room_is_refused(
    tiny_config: Configure,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(plans, "read_memory", lambda root: (GIB // 8, GIB))
    path = tmp_path / "tight.yaml"
    path.write_text(configs.dump(tiny_config(name="tight", clients={"per_actor": 1})))
    monkeypatch.setattr("sys.argv", ["fellray", "plan", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    wanted = ("would not fit: asked clients.per_actor=1", "this machine has", "5 client actors")
    assert [words for words in wanted if words not in said] == [], said


@pytest.mark.long
def test_auto_is_settled_once_and_changes_no_bit(
    tiny_config: Configure, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = tiny_config(name="auto", clients={"per_actor": "auto"}, train={"rounds": 1})
    train(auto)
    held = json.loads(Storage(auto.storage).sub(auto.name).read("config.json"))
    number = held["clients"]["per_actor"]
    assert number in (1, 2, 3, 5)
    # the same command goes on without another probe, and so does one with a number of its own
    monkeypatch.setattr(plans, "run_probe", None)
    longer = {**auto.model_dump(mode="json"), "train": {**held["train"], "rounds": 2}}
    train(configs.parse(longer, "longer"))
    other = 1 if number != 1 else 5
    longer["clients"]["per_actor"] = other
    longer["train"]["rounds"] = 3
    dealt_anew = train(configs.parse(longer, "dealt anew"))
    plain = train(tiny_config(name="plain", clients={"per_actor": 5}, train={"rounds": 3}))
    assert dealt_anew["final_hashes"] == plain["final_hashes"]


@pytest.mark.long
def test_auto_without_room_is_refused_before_anything_is_written(
    tiny_config: Configure, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "read_memory", lambda root: (GIB // 8, GIB))
    config = tiny_config(name="full", clients={"per_actor": "auto"})
    with pytest.raises(FellrayError, match=r"asked clients.per_actor=auto .* use larger nodes"):
        train(config)
    assert Storage(config.storage).list() == []


def test_a_cluster_is_what_ray_counts(local_ray: None) -> None:
    (node,) = plans._read_cluster()
    counted = ray.cluster_resources()
    assert (node.cpus, node.memory_bytes) == (counted["CPU"], counted["memory"])
    assert node.driver
    assert node.gpus == counted.get("GPU", 0)
