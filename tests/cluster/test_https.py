"""A service over HTTPS that gets a second replica of either deployment while it is asked much."""

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from certificate import write_certificate
from driver import Driver, title, wait_until
from loops import Loop
from test_serving import train_here, up

from fellray.jobs.ports import find_ports
from fellray.platform.config import RunConfig
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve.client import Client
from fellray.serve.tokens import new_token
from fellray.serve.transport import ServiceError

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Secured:
    url: str
    port: int
    operator: str
    trust: ssl.SSLContext
    driver: Driver

    def replicas(self, deployment: str) -> list[psutil.Process]:
        name = f"ServeReplica:fellray:{deployment}"
        return [process for process in self.driver.look() if name in title(process)]


@pytest.fixture(scope="module")
def service(
    tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    here = tmp_path_factory.mktemp("https")
    folder = train_here(tiny_config())
    operator = new_token(Storage(folder), None)
    key, certificate = write_certificate(here)
    (port,) = find_ports(1)
    driver = Driver.python(
        *("-m", "fellray.jobs.cli", "serve", folder, f"--port={port}"),
        *(f"--tls-key={key}", f"--tls-certificate={certificate}"),
        # half a batch in hand is load: with 16 rows 24 connections are, with 128 they are not
        *("most_recommenders=2", "most_trunks=2", "rows=16"),
        *("cpus=0.3", "rate=100000", "burst=100000"),
        log=here / "driver",
    )
    try:
        wait_until(lambda: up(driver), 400, "the application says that it serves", pause_s=0.2)
        trust = ssl.create_default_context(cafile=certificate)
        yield Secured(f"https://127.0.0.1:{port}", port, operator, trust, driver)
    finally:
        driver.end()


def test_only_who_trusts_the_certificate_is_answered(service: Secured) -> None:
    assert f"is served at {service.url}" in service.driver.text()[0]
    with Client(service.url, service.operator, tls=service.trust) as client:
        answer = client.recommend("c0", history=[1], k=3)
    assert len(answer.items) == 3
    with (
        Client(service.url, service.operator, tries=1) as stranger,
        pytest.raises(ServiceError, match="certificate"),
    ):
        stranger.recommend("c0", history=[1], k=3)
    plain = service.url.replace("https", "http")
    with pytest.raises((OSError, urllib.error.URLError)):
        urllib.request.urlopen(f"{plain}/healthz", timeout=10)


def test_replicas_come_with_requests(service: Secured, tiny_data: Path) -> None:
    """Ray Serve waits half a minute before it believes in the load."""
    data = Dataset(tiny_data)
    queries = [
        {"client": client, "user_id": user, "k": 5}
        for client in data.clients
        for user in data.shard(client).users[:4].tolist()
    ]
    assert [len(service.replicas(name)) for name in ("Recommender", "Trunk")] == [1, 1]
    with Client(service.url, service.operator, tls=service.trust) as client:
        before = {str(q): client.recommend(q["client"], user_id=q["user_id"], k=5) for q in queries}
    loop = Loop(service.port, service.operator, queries, service.trust)
    with loop.running(24):
        wait_until(
            lambda: len(service.replicas("Recommender")) == 2,
            300,
            "a second recommender",
            pause_s=0.5,
        )
        known = len(loop.sent)
        wait_until(lambda: len(loop.sent) > known + 200, 300, "it answers", pause_s=0.5)
    assert {sent.status for sent in loop.sent} == {200}
    for sent in loop.sent:
        query = queries[sent.query]
        assert sent.answer["items"] == [i.model_dump() for i in before[str(query)].items]
    print(f"{len(loop.sent)} requests, 0 failed; recommenders 1 -> 2, trunks 1 -> ", end="")
    print(len(service.replicas("Trunk")))
