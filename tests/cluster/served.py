"""`fellray serve` on a Ray of its own, for the files of tests that ask it one after the other."""

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from driver import Driver, wait_until
from test_job import free_ports

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.train import one_round
from fellray.platform.config import RunConfig
from fellray.platform.run import open_run
from fellray.platform.storage import Storage
from fellray.serve.tokens import new_token

LAST = 2


@dataclass(frozen=True)
class Service:
    folder: str
    port: int
    operator: str
    own: str
    """The token of the first client."""
    driver: Driver

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(
        self, method: str, path: str, body: Any = None, token: str | None = ""
    ) -> tuple[int, Any]:
        """Status and body. Args: body: bytes go as they are. token: the operator's if empty."""
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token or self.operator}"
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        is_json = response.headers["Content-Type"].startswith("application/json")
        return response.status, json.loads(text) if is_json else text


def train_here(config: RunConfig) -> str:
    """A run made in this process; its folder."""
    world = survey(config)
    with open_run(config, world.data_sha256) as run, Plant.inline(config, world, run.rounds) as p:
        for t in run.to_go():
            outcome = p.replayed(one_round, t, config)
            run.commit(t, outcome, p.close_ledger(), p.take_events())
    return f"{config.storage}/{config.name}"


@pytest.fixture(scope="session")
def service(
    tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = train_here(tiny_config(keep_last=LAST + 1))
    operator = new_token(Storage(folder), None)
    own = new_token(Storage(folder), "c0")
    (port,) = free_ports(1)
    driver = Driver.python(
        *("-m", "fellray.jobs.cli", "serve", folder, f"--port={port}"),
        *("round=latest", "cpus=0.5", "body_kib=64", "adapters=2"),
        log=tmp_path_factory.mktemp("serve") / "driver",
    )
    service = Service(folder, port, operator, own, driver)
    try:
        wait_until(lambda: up(driver), 400, "the application says that it serves", pause_s=0.2)
        yield service
    finally:
        driver.end()


def up(driver: Driver) -> bool:
    assert driver.running(), driver.text()
    driver.look()
    return "is served at" in driver.text()[0]
