"""A run on a real Ray, seen through the metrics endpoint of its node."""

import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from driver import wait_until

from fellray.actors.session import ray
from fellray.actors.telemetry import NAMES
from fellray.jobs.train import train
from fellray.platform.config import RunConfig
from fellray.platform.journal import Journal
from fellray.platform.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
LINE = re.compile(r"ray_(fellray_\w+)\{(.*)\} (\S+)")

Scraped = dict[tuple[str, str], float]
"""(name, kind of bytes or nothing) -> value, of one run."""


def scrape(run: str) -> Scraped:
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
    except urllib.error.URLError:  # not open yet
        return {}
    found = {}
    for name, written, value in LINE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', written))
        if tags.get("run") == run:
            found[name, tags.get("kind", "")] = float(value)
    return found


@pytest.mark.long
def test_the_endpoint_shows_what_the_run_recorded(
    tiny_config: Callable[..., RunConfig], local_ray: None
) -> None:
    config = tiny_config(name="watched", clients={"per_actor": 3})
    train(config)
    journal = Journal(Storage(config.storage).sub(config.name))
    rows = journal.rows("metrics")
    last = rows[-1]
    kinds: dict[str, int] = {}
    for row in rows:
        assert sum(row["bytes_by_kind"].values()) == row["bytes"] > 0
        for kind, size in row["bytes_by_kind"].items():
            kinds[kind] = kinds.get(kind, 0) + size

    def shown() -> Scraped | None:
        found = scrape(config.name)
        complete = found.get(("fellray_round", "")) == config.train.rounds
        return found if complete and {name for name, _ in found} == set(NAMES) else None

    found = wait_until(shown, 60, "every name is shown, with the last round", pause_s=1.0)
    assert {kind: v for (name, kind), v in found.items() if name == "fellray_bytes_total"} == kinds
    values = {name: value for (name, kind), value in found.items() if not kind}
    assert values["fellray_rounds"] == config.train.rounds == 2
    assert values["fellray_clients_asked"] == values["fellray_clients_accepted"] == 5
    assert values["fellray_clients_late"] == values["fellray_clients_refused"] == 0
    assert values["fellray_clients_dormant"] == 0
    assert values["fellray_clients_active"] in (0, 5)  # Ray tells it now and then
    assert values["fellray_loss"] == pytest.approx(last["loss"])
    assert values["fellray_ndcg_at_10"] == pytest.approx(last["validation"]["ndcg@10"])
    assert values["fellray_worst_client_ndcg_at_10"] == pytest.approx(last["worst_ndcg@10"])
    batches = values["fellray_server_batches_total"]
    # forward and backward: 2 rounds of 3 steps for each of 2 actors, at most all of them alone
    assert 2 * 2 * 3 <= batches <= values["fellray_server_requests_total"]
    assert values["fellray_server_tokens_total"] > batches
    assert values["fellray_server_busy_seconds_total"] > 0


def test_the_endpoint_is_as_open_as_the_readme_says(local_ray: None) -> None:
    """All addresses, and no token: should a later Ray change that, the words must change."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert "listens on all addresses of every node and asks for no token" in " ".join(
        readme.split()
    )
    (node,) = ray.nodes()
    port = node["MetricsExportPort"]
    below = psutil.Process().children(recursive=True)
    heard = {
        c.laddr.ip
        for process in below
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    assert heard == {"0.0.0.0"}
    wait_until(lambda: answers(port), 60, "the endpoint answers", pause_s=1.0)


def answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).status == 200
    except urllib.error.URLError:
        return False
