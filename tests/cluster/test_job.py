"""`ray job submit` on a cluster that asks for a token: actors lie where the config says."""

import json
import secrets
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from driver import ROOT, Driver, plain_environment, wait_until

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.ports import find_ports
from fellray.jobs.train import one_round
from fellray.platform import config as configs
from fellray.platform.config import RunConfig
from fellray.platform.run import open_run
from fellray.platform.summary import HASHED

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
RAY = ("-m", "ray.scripts.scripts")

Configure = Callable[..., RunConfig]


@dataclass(frozen=True)
class Cluster:
    """A head node of this test's own, with two pretended GPUs."""

    dashboard: str
    token: str
    folder: Path
    """Everything it writes."""

    def environment(self) -> dict[str, str]:
        """What a user who has the token exports."""
        path = f"{Path(sys.executable).parent}:{plain_environment()['PATH']}"
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return plain_environment() | auth | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}

    def get(self, token: str | None) -> int:
        """HTTP status of asking for the list of jobs."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except urllib.error.URLError:
            return 0

    def ray(self, *arguments: str, log: Path, seconds: float = 150) -> tuple[int, str, str]:
        """A `ray` command to its end."""
        command = Driver.python(*RAY, *arguments, log=log, env=self.environment())
        try:
            return command.finish(seconds)
        finally:
            command.end()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`ray start --head`, with folder, ports and token of its own."""
    # not below pytest's folder: the path of a socket has at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="fellray-"))
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    names += ("node-manager-port", "object-manager-port", "metrics-export-port")
    ports = dict(zip(names, find_ports(len(names)), strict=True))
    made = Cluster(f"http://127.0.0.1:{ports['dashboard-port']}", secrets.token_hex(32), folder)
    head = Driver.python(
        *(*RAY, "start", "--head", "--block", "--num-cpus=4", "--num-gpus=2"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"),
        *(f"--temp-dir={folder}", "--object-store-memory=200000000"),
        *(f"--{name}={port}" for name, port in ports.items()),
        log=folder / "head",
        env=made.environment(),
    )

    def up() -> bool:
        assert head.running(), head.text()
        return made.get(made.token) == 200

    try:
        wait_until(up, 90, "the dashboard answers")
        yield made
    finally:
        head.look()
        head.process.terminate()
        head.left(15)
        head.end()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_stranger_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.get(None) in (401, 403)
    assert cluster.get(secrets.token_hex(32)) in (401, 403)
    assert cluster.get(cluster.token) == 200


@pytest.mark.long
def test_a_job_trains_where_it_was_told_to(
    cluster: Cluster, tiny_config: Configure, tmp_path: Path
) -> None:
    """Client actors on tenths of a GPU, the server on half of one, and the usual numbers."""
    settings = {"train": {"rounds": 1}, "clients": {"per_actor": 3, "gpu_denominator": 10}}
    config = tiny_config(**settings, server={"engine": "deepspeed", "gpus": 0.5})
    path = tmp_path / "job.yaml"
    path.write_text(configs.dump(config))
    status, out, err = cluster.ray(
        *("job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT)),
        *("--", "python", "jobs/train.py", str(path)),
        log=tmp_path / "submit",
    )
    assert status == 0, out + err
    assert "succeeded" in out

    run = Path(config.storage) / config.name
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final_hashes"] == hashes_in_this_process(tiny_config(**settings))

    status, out, err = cluster.ray(
        *("list", "actors", "--address", cluster.dashboard, "--detail", "--format", "json"),
        log=tmp_path / "list",
    )
    assert status == 0, err
    asked = sorted(
        (actor["class_name"], actor["required_resources"])
        for actor in json.loads(out[out.index("[") :])
        if actor["class_name"] in ("Client", "Server")
    )
    client = ("Client", {"CPU": 0.5, "GPU": 0.1})
    assert asked == [client, client, ("Server", {"CPU": 1.0, "GPU": 0.5})]

    (uploaded,) = cluster.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert (uploaded / "jobs/train.py").exists()
    assert (uploaded / "fellray/__init__.py").exists()
    assert not (uploaded / ".venv").exists()
    assert sum(file.stat().st_size for file in uploaded.rglob("*") if file.is_file()) < 5e6


def hashes_in_this_process(config: RunConfig) -> dict[str, str]:
    """Of the last round, by the torch engine."""
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        Plant.inline(config, world, run.rounds) as plant,
    ):
        for t in run.to_go():
            outcome = plant.replayed(one_round, t, config)
            run.commit(t, outcome, plant.close_ledger(), plant.take_events())
        return run.rounds.hashes(config.train.rounds, HASHED, plant.learners)
