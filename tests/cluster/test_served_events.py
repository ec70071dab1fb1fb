"""Events over HTTP: sent twice, a replica killed meanwhile, each stored and trained on once."""

import http.client
import itertools
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from driver import Driver, title, wait_until
from test_serving import Service, train_here, up

from fellray.actors.plant import Plant
from fellray.jobs import opening
from fellray.jobs import train as training
from fellray.jobs.continuation import continue_run
from fellray.jobs.ports import find_ports
from fellray.platform.config import RunConfig
from fellray.platform.events import EventLog
from fellray.platform.shard import LATER
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve.tokens import new_token

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
TOGETHER = 5
"""Events of one request."""


REPLICA = """
import sys
import uvicorn
from fellray.platform.storage import Storage
from fellray.serve.api import make_api
from fellray.serve.args import Args
from fellray.serve.tokens import read_tokens
from fellray.serve.whole import open_whole

run, port = sys.argv[1:]
args = Args(run=run, round="latest", rate=1e5, burst=100_000)
tokens = read_tokens(Storage(run))
api = make_api(open_whole(args), args, lambda: tokens, {"replica": port})
uvicorn.run(api, port=int(port), log_level="error")
"""
"""One without Ray: it can be asked by itself."""


@pytest.fixture
def folder(tiny_config: Callable[..., RunConfig], tiny_data: Path, tmp_path: Path) -> str:
    """A run of round 0, whose data are its own."""
    shutil.copytree(tiny_data, tmp_path / "data" / "prepared")
    path = str(tmp_path / "data" / "prepared")
    config = tiny_config(storage=str(tmp_path / "runs"), data={"path": path}, train={"rounds": 0})
    folder = train_here(config)
    Storage(folder).write("summary.json", b"{}")  # so it counts as finished
    return folder


@pytest.fixture
def replicas(folder: str, launch: Callable[..., Driver]) -> list[Service]:
    """Two processes that know nothing of each other."""
    operator = new_token(Storage(folder), None)
    started = []
    for port in find_ports(2):
        driver = launch("-c", REPLICA, folder, str(port))
        started.append(Service(folder, port, operator, "", driver))
    for one in started:
        wait_until(lambda: answers(one), 200, "a replica answers", pause_s=0.05)  # noqa: B023
    return started


@pytest.fixture
def service(folder: str, tmp_path: Path) -> Iterator[Service]:
    """`fellray serve` with two replicas."""
    operator = new_token(Storage(folder), None)
    (port,) = find_ports(1)
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


def answers(service: Service) -> bool:
    assert service.driver.running(), service.driver.text()
    try:
        return service.ask("GET", "/healthz", token=None)[0] == 200
    except OSError:
        return False


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
    """Send every request until it is answered, to whichever service answers; count what came."""

    def __init__(self, services: Sequence[Service]):
        self.services = services
        self.answers: Counter[str] = Counter()
        self.done = 0
        self._turn = itertools.count()
        self._counting = threading.Lock()

    def send(self, events: list[dict[str, Any]]) -> dict[str, int]:
        """Until it is stored; then every service is asked at once for a user that met something."""
        while True:
            status, answer = self._try("/v1/events", {"events": events}, next(self._turn))
            if status == 200:
                break
            assert status in (500, 503) or isinstance(status, str), answer
        for at in range(2):
            self._look(events[-1], at)
        with self._counting:
            self.done += 1
        found: dict[str, int] = answer
        return found

    def _look(self, event: dict[str, Any], at: int) -> None:
        query = {"client": event["client"], "user_id": event["user_id"], "k": 50}
        status, answer = self._try("/v1/recommend", query, at)
        if status == 200:
            assert event["item_id"] not in [item["item_id"] for item in answer["items"]]

    def _try(self, path: str, body: Any, turn: int) -> tuple[int | str, Any]:
        service = self.services[turn % len(self.services)]
        status: int | str
        try:
            status, answer = service.ask("POST", path, body)
        except (OSError, http.client.HTTPException) as error:
            status, answer = type(error).__name__, {}
        with self._counting:
            self.answers[f"{path} {status}"] += 1
        return status, answer


def find_replicas(service: Service) -> list[Any]:
    return [p for p in service.driver.look() if "ServeReplica:fellray:Recommender" in title(p)]


def send_twice(
    services: Sequence[Service], events: list[dict[str, Any]], kill: Callable[[], None]
) -> Counter[str]:
    """Every request twice, by different threads; in the middle `kill` is called."""
    requests = [events[at : at + TOGETHER] for at in range(0, len(events), TOGETHER)]
    twice = requests * 2
    random.Random(4).shuffle(twice)
    senders = Senders(services)
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(senders.send, few) for few in twice]
        wait_until(lambda: senders.done >= len(twice) // 2, 200, "half of them are sent", 0.001)
        kill()
        told = [one.result() for one in sent]
    assert all(one["stored"] + one["known"] == TOGETHER for one in told)
    # a request that was stored and not answered is known the next time
    assert sum(one["stored"] for one in told) <= len(events)
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
    assert sorted(stored, key=itemgetter("event_id")) == sorted(events, key=itemgetter("event_id"))


def check_trained(data: Dataset, events: list[dict[str, Any]]) -> None:
    expected = Counter((e["client"], e["user_id"], e["item_id"], e["timestamp"]) for e in events)
    found: Counter[tuple[Any, ...]] = Counter()
    for client in data.clients:
        table = data.rows(client)
        rows = table.filter(pc.equal(table["split"], LATER)).to_pylist()
        found.update(
            (client, row["user_id"], int(data.item_ids[row["item"]]), row["timestamp"])
            for row in rows
        )
    assert found == expected


class Quiet:
    """`RunTelemetry` without Ray."""

    def __init__(self, config: RunConfig, registered: int):
        pass

    def show(self, row: Any) -> None:
        pass


@pytest.mark.long
def test_sent_twice_and_a_replica_killed_each_event_is_trained_on_once(
    replicas: list[Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training itself in this process."""
    events = make_events(Dataset(tmp_path / "data" / "prepared"), 300)
    answered = send_twice(replicas, events, replicas[0].driver.process.kill)
    assert answered["/v1/events ConnectionRefusedError"]
    assert answered["/v1/recommend 200"] >= 120
    check_stored(replicas[1], events)
    monkeypatch.setattr(Plant, "on_ray", Plant.inline)
    monkeypatch.setattr(opening, "connect", lambda *_: nullcontext())
    monkeypatch.setattr(training, "RunTelemetry", Quiet)
    summary = continue_run(replicas[1].folder)
    assert summary["run"] == "tiny-1"
    check_trained(Dataset(tmp_path / "data" / "tiny-1"), events)


@pytest.mark.long
def test_a_thousand_events_and_the_commands(
    service: Service, tmp_path: Path, launch: Callable[..., Driver]
) -> None:
    """`fellray serve` with two replicas, one of which is killed, and `fellray continue`."""
    wait_until(lambda: len(find_replicas(service)) == 2, 60, "there are two replicas")
    events = make_events(Dataset(tmp_path / "data" / "prepared"), 1000)
    victim = find_replicas(service)[0]
    answered = send_twice([service], events, victim.kill)
    assert not victim.is_running()
    check_stored(service, events)
    cli = ("-m", "fellray.jobs.cli", "continue", service.folder)
    status, out, err = launch(*cli, "--rounds=2").finish()
    assert status == 0, out + err
    assert "1000 new events of 5 clients are training interactions in" in out
    check_trained(Dataset(tmp_path / "data" / "tiny-1"), events)
    status, out, err = launch(*cli).finish()
    assert status == 2
    assert "was continued as tiny-1, which has its events" in err
    print(f"1000 events sent twice: stored once each, trained on once each; {dict(answered)}")
