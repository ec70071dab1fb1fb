"""FedPA through Ray: the numbers are those of one process, whoever answers first or is lost."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from attribute_clicks import make_config, write_source

from fellray.actors.attribute_client import PRIVATE, AttributeClient
from fellray.actors.attribute_plant import AttributePlant
from fellray.actors.attribute_world import AttributeWorld
from fellray.actors.pool import RayPool
from fellray.actors.session import ray
from fellray.jobs.attributes import prepare_attributes
from fellray.jobs.train import one_round, train
from fellray.platform.config import RunConfig
from fellray.platform.messages import Update
from fellray.platform.rounds import Rounds
from fellray.platform.run import read_run
from fellray.platform.run_list import list_runs
from fellray.platform.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1200)]


def play(config: RunConfig, kind: type[AttributePlant], inline: bool, lose: bool) -> dict[str, str]:
    world, rounds = AttributeWorld(config), Rounds(Storage(config.storage).sub(config.name))
    with (kind.inline if inline else kind.on_ray)(config, world, rounds) as plant:
        for t in range(config.train.rounds + 1):
            if lose and t == 2:
                assert isinstance(plant._clients, RayPool)
                ray.kill(plant._clients.handles[1], no_restart=False)
            outcome = plant.replayed(one_round, t, config)
            rounds.commit(t, outcome.staged, {})
        shared = plant.hash_shared(2)
    return {**rounds.hashes(2, [PRIVATE], world.clients), "shared": shared}


def test_ray_is_one_process(local_ray: None, tmp_path: Path) -> None:
    class Slow(AttributeClient):  # in here, so that Ray carries it along
        def fit(self, round: int, clients: Sequence[str]) -> Update:
            update = super().fit(round, clients)
            time.sleep(0.3 if self._holder == "clients-00000" else 0.0)
            return update

    class Late(AttributePlant):
        """Its first actor answers last."""

        _client = Slow

    source = write_source(tmp_path / "source")
    prepare_attributes(make_config(source, tmp_path))
    wanted = play(make_config(source, tmp_path / "a"), AttributePlant, True, False)
    eight = {"clients": {"per_actor": 6, "cpus": 0.5}}
    config = make_config(source, tmp_path / "b", **eight)
    assert play(config, Late, False, False) == wanted
    config = make_config(source, tmp_path / "c", clients={"per_actor": 21, "cpus": 0.5})
    assert play(config, AttributePlant, False, True) == wanted


def test_the_command_trains_tests_and_sets_embeddings_alone_beside(
    local_ray: None, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source")
    more = {"attributes": {"baseline": True}, "clients": {"per_actor": 21, "cpus": 0.5}}
    config = make_config(source, tmp_path, **more)
    prepare_attributes(config)
    summary = train(config)
    run = read_run(f"{tmp_path}/runs/tiny")
    assert run.read_json("summary.json") == summary
    for row in ("test", "untrained", "embedding_only", "validation"):
        assert summary[row]["auc"] > 0.4, row
    assert (
        sum(one["samples"] for one in summary["reliability"]["test"])
        == (summary["data"]["counts"]["test"])
    )
    for attribute, sizes in summary["group_sizes"].items():
        assert len(sizes) == summary["groups"][attribute]
        assert sum(sizes.values()) == 42
    for name in ("tiny", "tiny-embedding-only"):
        page = (tmp_path / "runs" / name / "report.html").read_text()
        assert f"<h1>{name}</h1>" in page
        assert ("nothing sent (" in page) == (name == "tiny")
    assert summary["adapter_norms"]["user.B"] > 0
    assert summary["bytes"]["adapter_up"] == 2 * 42 * summary["counts"]["upload"] * 4
    assert [row["round"] for row in run.journal.rows("metrics")] == [0, 1, 2]
    listed = {row[0]: row for row in list_runs(str(tmp_path / "runs"))}
    assert listed["tiny"][-1] == "finished"
    assert listed["tiny"][5].startswith("AUC 0.")
    assert listed["tiny-embedding-only"][-1] == "finished"
    assert train(config)["final_hashes"] == summary["final_hashes"]
