"""Events over real HTTP: each is sent twice, a replica is killed meanwhile, and each is there once."""

import http.client
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driver import Driver, title, wait_until
from test_job import free_ports
from test_serving import Service, train_here, up

from fellray.actors.plant import Plant
from fellray.jobs import train as training
from fellray.jobs.continuation import continue_run
from fellray.platform.config import RunConfig
from fellray.platform.events import EventLog
from fellray.platform.shard import LATER
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve.tokens import new_token

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
TOGETHER = 5
"""Events of one request."""


@pytest.fixture
def service(
    tiny_config: Callable[..., RunConfig], tiny_data: Path, tmp_path: Path
) -> Iterator[Service]:
    """Two replicas of a run of round 0, whose data are its own."""
    shutil.copytree(tiny_data, tmp_path / "data" / "prepared")
    path = str(tmp_path / "data" / "prepared")
    config = tiny_config(
        storage=str(tmp_path / "runs"), data={"path": path}, train={"rounds": 0}
    )
    folder = train_here(config)
    operator = new_token(Storage(folder), None)
    (port,) = free_ports(1)
    driver = Driver.python(
        *("-m", "fellray.jobs.cli", "serve", folder, f"--port={port}"),
        *("cpus=0.3", "recommenders=2", "rate=100000", "burst=100000"),
        log=tmp_path / "driver",
    )
    try:
        wait_until(lambda: up(driver), 400, "the application says that it serves", pause_s=0.1)
        yield Service(folder, port, operator, "", driver)
    finally:
        driver.end()


def make_events(data: Dataset, count: int) -> list[dict[str, Any]]:
    draw = random.Random(3)
    clients = list(data.clients)
    users = {client: data.shard(client).users.tolist() for client in clients}
    events = []
    for number in range(count):
        client = draw.choice(clients)
        events.append(
            {
                "event_id": f"e{number}",
                "client": client,
                "user_id": draw.choice(users[client]),
                "item_id": int(draw.choice(data.item_ids.tolist())),
                "timestamp": 1_700_000_000 + draw.randrange(1000),
            }
        )
    return events


class Senders:
    """Some threads that send every request until it is answered, and count what came."""

    def __init__(self, service: Service):
        self.service = service
        self.answers: Counter[str] = Counter()
        self.done = 0
        self._counting = threading.Lock()

    def send(self, events: list[dict[str, Any]]) -> dict[str, int]:
        """Until it is stored; then at once ask for a user whose event it was."""
        while True:
            try:
                status, answer = self.service.ask("POST", "/v1/events", {"events": events})
            except (OSError, http.client.HTTPException) as error:
                status, answer = type(error).__name__, {}
            with self._counting:
                self.answers[str(status)] += 1
            if status == 200:
                break
            assert status in (500, 503) or isinstance(status, str), answer
        self.done += 1
        self.look(events[-1])
        found: dict[str, int] = answer
        return found

    def look(self, event: dict[str, Any]) -> None:
        """Whichever replica answers: the item is seen."""
        query = {"client": event["client"], "user_id": event["user_id"], "k": 50}
        try:
            status, answer = self.service.ask("POST", "/v1/recommend", query)
        except (OSError, http.client.HTTPException):
            return
        if status == 200:
            self.answers["looked"] += 1
            assert event["item_id"] not in [item["item_id"] for item in answer["items"]]


def replicas(service: Service) -> list[Any]:
    return [p for p in service.driver.look() if "ServeReplica:fellray:Recommender" in title(p)]


def send_twice_and_kill(service: Service, events: list[dict[str, Any]]) -> Counter[str]:
    """Every request twice, by different threads; at half of it a replica is killed."""
    wait_until(lambda: len(replicas(service)) == 2, 60, "there are two replicas")
    requests = [events[at : at + TOGETHER] for at in range(0, len(events), TOGETHER)]
    twice = [*requests, *requests[::-1]]
    random.Random(4).shuffle(twice)
    senders = Senders(service)
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(senders.send, few) for few in twice]
        wait_until(lambda: senders.done >= len(twice) // 2, 200, "half of them are sent", 0.001)
        victim = replicas(service)[0]
        victim.kill()
        answers = [one.result() for one in sent]
    assert all(a["stored"] + a["known"] == TOGETHER for a in answers)
    assert not victim.is_running()
    # what was stored in a request that was not answered is known in the next
    assert sum(a["stored"] for a in answers) <= len(events)
    return senders.answers


def check_stored(service: Service, events: list[dict[str, Any]]) -> None:
    stored = []
    for file in sorted(Path(service.folder, "events").glob("*.jsonl")):
        EventLog(str(file)).catch_up()  # every line is whole
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        stored += [{"client": file.stem, **line} for line in lines]
    assert len(stored) == len(events)
    for line in stored:
        del line["sha256"]
    key = lambda event: event["event_id"]  # noqa: E731
    assert sorted(stored, key=key) == sorted(events, key=key)


def check_trained(data: Dataset, events: list[dict[str, Any]]) -> None:
    expected = Counter((e["client"], e["user_id"], e["item_id"], e["timestamp"]) for e in events)
    found: Counter[tuple[Any, ...]] = Counter()
    for client in data.clients:
        table = data.rows(client).to_pandas() if False else data.rows(client)
        later = table["split"].to_numpy() == LATER
        columns = [table[name].to_numpy()[later] for name in ("user_id", "item", "timestamp")]
        columns[1] = data.item_ids[columns[1]]
        found.update((client, *row) for row in zip(*(c.tolist() for c in columns), strict=True))
    assert found == expected


def test_sent_twice_and_a_replica_killed_each_event_is_trained_on_once(
    service: Service, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = make_events(Dataset(tiny_data), 100)
    answers = send_twice_and_kill(service, events)
    assert answers["looked"]
    check_stored(service, events)
    monkeypatch.setattr(Plant, "on_ray", Plant.inline)
