"""Nodes come, train, are lost, and go: 0 -> 3 -> 0 with Ray's autoscaler on this machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from driver import Driver, title, wait_until

from fellray.platform.config import dump
from fellray.platform.journal import Journal
from fellray.platform.rounds import Rounds
from fellray.platform.run import read_run
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.platform.summary import HASHED

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]
ROUNDS, SAMPLED = 5, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scale")


def test_three_nodes_come_and_go(launch: Callable[..., Driver], folder: Path) -> None:
    driver = launch(
        *("-m", "fellray.jobs.cli", "scale", str(folder), "--registered", "12"),
        *("--node-cpus", "2"),
        *("--sampled", str(SAMPLED), "--rounds", str(ROUNDS), "--dry", "1000"),
        *("clients.slots=2", "method.kind=fellrec"),
    )
    status, out, err = driver.finish(600)
    assert status == 0, out + err
    assert driver.left(30) == []
    assert "counted once" in out

    report: dict[str, Any] = json.loads((folder / "scale.json").read_text())
    (point,) = report["points"]
    counts = [count for _, count in point["nodes_seen"]]
    assert counts[0] == counts[-1] == 0
    assert max(counts) == 3
    assert len(point["lost"]) == 1
    back = counts[counts.index(3) :]
    assert min(back[: len(back) - back[::-1].index(3)]) == 2, "one was lost, and came again"
    assert point["down_s"] is not None
    assert any("lost and begun again" in e for row in point["rounds"] for e in row["events"])

    assert point["updates"] == {
        "asked": ROUNDS * SAMPLED,
        "once": ROUNDS * SAMPLED,
        "missing": 0,
        "more": 0,
        "of_others": 0,
    }
    rows = Journal(Storage(str(folder / "runs" / point["run"]))).rows("metrics")
    assert [len(row["losses"]) for row in rows if "losses" in row] == [SAMPLED] * ROUNDS
    assert point["same_hashes"]
    assert "0 nodes lost" not in (folder / "scale.html").read_text()
    assert point["cost_per_round"] > 0


def test_a_fixed_cluster_gives_the_same_hashes(
    launch: Callable[..., Driver], folder: Path, tmp_path: Path
) -> None:
    """The run of the test above again, on nodes that were there before it and stay."""
    (point,) = json.loads((folder / "scale.json").read_text())["points"]
    moved = read_run(str(folder / "runs" / point["run"]))
    there = moved.config.cluster.model_copy(update={"address": "local"})
    path = tmp_path / "fixed.yaml"
    path.write_text(dump(moved.config.model_copy(update={"name": "fixed", "cluster": there})))
    status, out, err = launch("-m", "fellray.jobs.cli", "train", str(path)).finish(600)
    assert status == 0, out + err

    fixed = read_run(str(folder / "runs" / "fixed"))
    learners = sorted(Dataset(moved.config.data.path).manifest["clients"])
    assert len(learners) == 12
    hashes = [Rounds(run.storage).hashes(ROUNDS, HASHED, learners) for run in (moved, fixed)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0].values())) > 1


def test_a_sweep_that_is_told_to_end_leaves_no_cluster(
    launch: Callable[..., Driver], tmp_path: Path
) -> None:
    driver = launch("-m", "fellray.jobs.cli", "scale", str(tmp_path), "--registered", "12")
    wait_until(
        lambda: [p for p in driver.look() if title(p).startswith("ray::TimedClient")],
        *(300, "clients are there", 0.2),
    )
    driver.process.terminate()
    status, _, err = driver.finish(60)
    assert driver.left(90) == []
    assert status == 130
    assert err.endswith("fellray: interrupted; nothing was reported\n")
