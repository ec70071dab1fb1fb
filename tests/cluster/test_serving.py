"""`fellray serve` on a Ray of its own, over real HTTP: answers, refusals, live rounds, sockets."""

import asyncio
import http.client
import json
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from driver import Driver, plain_environment, title, wait_until
from test_job import free_ports

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.train import one_round
from fellray.platform.config import RunConfig
from fellray.platform.promotion import promote, roll_back
from fellray.platform.run import open_run, read_run
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve.args import Args
from fellray.serve.schema import ByUser
from fellray.serve.tokens import new_token
from fellray.serve.whole import open_whole

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
LAST = 2


@dataclass(frozen=True)
class Service:
    folder: str
    port: int
    operator: str
    own: str
    """The token of the first client."""
    driver: Driver

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


@pytest.fixture(scope="module")
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


def test_the_answers_are_those_of_one_process(service: Service, tiny_data: Path) -> None:
    data = Dataset(tiny_data)
    queries = [
        {"client": client, "user_id": user, "as_of": "test", "k": 20}
        for client in data.clients
        for user in data.shard(client).users[:3].tolist()
    ]
    whole = open_whole(Args(run=service.folder, round=LAST))
    try:
        expected = asyncio.run(whole.recommend([ByUser(**q) for q in queries]))
    finally:
        whole.close()
    status, batch = service.ask("POST", "/v1/recommend/batch", {"queries": queries})
    assert status == 200, batch
    assert batch["answers"] == [answer.model_dump() for answer in expected]
    for query, answer in zip(queries[:3], expected, strict=False):
        assert service.ask("POST", "/v1/recommend", query) == (200, answer.model_dump())
    assert {answer.layer for answer in expected} == {"client"}


def test_what_can_be_read(service: Service, tiny_data: Path) -> None:
    data = Dataset(tiny_data)
    item = {"item_id": int(data.item_ids[3]), "title": data.titles[3]}
    status, found = service.ask("GET", f"/v1/items/{item['item_id']}", token=service.own)
    assert (status, found | item) == (200, found)
    status, client = service.ask("GET", "/v1/clients/c0", token=service.own)
    assert (status, client["layer"], client["round"]) == (200, "client", LAST)
    assert client["users"] == len(data.shard("c0").users)
    status, runs = service.ask("GET", "/v1/runs", token=service.own)
    assert (status, runs["runs"][0]["committed"]) == (200, [0, 1, 2])
    for path in ("/healthz", "/readyz"):
        assert service.ask("GET", path, token=None) == (200, {"status": "ok"})
    status, schema = service.ask("GET", "/openapi.json", token=None)
    assert (status, "/v1/recommend" in schema["paths"]) == (200, True)
    status, text = service.ask("GET", "/metrics")
    assert status == 200
    assert 'route="/v1/items/{id}",status="200"' in text


def test_refusals(service: Service) -> None:
    def refused(method: str, path: str, body: Any = None, token: str | None = "") -> Any:
        status, answer = service.ask(method, path, body, token)
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"code", "message", "field"}
        return status, answer["error"]["code"], answer["error"]["field"]

    path, query = "/v1/recommend", {"client": "c0", "history": ["word01"]}
    assert refused("POST", path, query, None) == (401, "no_token", None)
    assert refused("POST", path, b"{", None) == (401, "no_token", None)
    assert refused("POST", path, query, "x") == (401, "wrong_token", None)
    other = {**query, "client": "c1"}
    assert refused("POST", path, other, service.own) == (403, "not_allowed", "client")
    assert refused("GET", "/v1/clients/c1", token=service.own) == (403, "not_allowed", "id")
    assert refused("GET", "/metrics", token=service.own) == (403, "not_allowed", None)
    both = {"queries": [query, other]}
    assert refused("POST", f"{path}/batch", both, service.own)[2] == "queries.1.client"
    assert refused("GET", "/v1/clients/nobody") == (404, "unknown_client", "id")
    assert refused("GET", "/v1/items/999") == (404, "unknown_item", "id")
    assert refused("POST", path, {"client": "c0", "user_id": 999})[0] == 404
    assert refused("GET", "/nothing") == (404, "no_such_route", None)
    assert refused("DELETE", path)[0] == 405
    assert refused("POST", path, b'{"client": ' + b" " * 70_000)[0] == 413
    invalid = [
        (b"{", "no_json", None),
        (b"\xff\xfe", "no_json", None),
        (b"[" * 50_000, "no_json", None),
        ({**query, "k": 0}, "invalid", "k"),
        ({**query, "k": True}, "invalid", "k"),
        ({**query, "K": 3}, "invalid", "K"),
        ({**query, "history": [" "]}, "invalid", "history.0"),
        ({**query, "history": [1] * 1001}, "invalid", "history"),
        (b'{"client": "c0", "history": ["\\ud800"]}', "invalid", "history.0"),
        (b'{"client": "c0", "history": [1e400]}', "invalid", "history.0"),
        ({"client": "c0"}, "invalid", "history"),
        ({**query, "user_id": 1}, "invalid", "history"),
    ]
    for body, code, field in invalid:
        assert refused("POST", path, body) == (422, code, field), body


def test_a_round_is_taken_over_while_it_answers(service: Service) -> None:
    storage = read_run(service.folder).storage
    query = {"client": "c0", "history": ["word01", "word02 word03"]}

    def answer() -> tuple[int, Any]:
        status, found = service.ask("POST", "/v1/recommend", query, service.own)
        assert status == 200
        return found["round"], found["items"]

    assert answer()[0] == LAST
    promote(storage, 0, [0, 1, 2])
    wait_until(lambda: answer()[0] == 0, 5, "round 0 is served")
    start = answer()
    roll_back(storage)
    wait_until(lambda: answer()[0] == LAST, 5, "the last round is served again")
    assert answer()[1] != start[1]


def test_it_is_put_under_load(service: Service, tmp_path: Path) -> None:
    """`fellray bench serve` against a service that runs: files, and every request accounted for."""
    address = f"http://127.0.0.1:{service.port}"
    loads = ("--seconds=0.3", "--connections=2", "--users=20", "--zipf=1.1")
    bench = Driver.python(
        *("-m", "fellray.jobs.cli", "bench", "serve", service.folder, "--at", address),
        *(*loads, "--out", str(tmp_path)),
        log=tmp_path / "bench",
        env=plain_environment() | {"FELLRAY_TOKEN": service.operator},
    )
    try:
        status, out, err = bench.finish(120)
    finally:
        bench.end()
    assert status == 0, out + err
    results = json.loads((tmp_path / "bench-serve.json").read_text())
    assert [row["share"] for row in results["open_loops"]] == [0.3, 0.5, 0.7, 0.85]
    for row in results["open_loops"]:
        assert row["sent"] == row["answered"] + sum(row["errors"].values())
        assert set(row["errors"]) <= {"status 429"}
    assert results["arms"]["service"]["throughput"][0] > 0
    assert results["clients"] == 5
    assert "Latency over rate" in (tmp_path / "bench-serve.html").read_text()
    status, text = service.ask("GET", "/metrics")
    asked = re.search(r"fellray_serve_adapters_asked_total{.*} (\d+)", text)
    assert asked is not None
    assert int(asked[1]) > 0


@pytest.mark.long
def test_the_whole_bench(service: Service, tmp_path: Path) -> None:
    """Every arm, and more adapters than there is room for."""
    bench = Driver.python(
        *("-m", "fellray.jobs.cli", "bench", "serve", service.folder, "--adapters=40,80"),
        *("--seconds=1", "--turns=1", "--users=40", "--out", str(tmp_path), "round=latest"),
        log=tmp_path / "bench",
    )
    try:
        status, out, err = bench.finish(600)
    finally:
        bench.end()
    assert status == 0, out + err
    results = json.loads((tmp_path / "bench-serve.json").read_text())
    assert set(results["arms"]) == {
        *("service", "bare loop", "unbatched"),
        *("no-op", "stock no-op"),
    }
    assert all(arm["throughput"][0] > 0 for arm in results["arms"].values())
    assert not any(arm["errors"] for arm in results["arms"].values())
    few, many = results["adapters"]
    assert few["errors"] == many["errors"] == {}
    assert many["hit_rate"][0] < 1
    assert len(results["figures"]) == 6
    assert bench.left() == []


def test_every_socket_is_this_machines_or_asks_for_a_credential(service: Service) -> None:
    """Ray 2.60 listens on all addresses, whatever it is told; each call must want its token."""
    heard = {
        (connection.laddr.ip, connection.laddr.port)
        for process in [*service.driver.look(), psutil.Process(service.driver.process.pid)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    # the proxy alone speaks HTTP to the world
    assert {(ip, port) for ip, port in heard if port == service.port} == {
        ("127.0.0.1", service.port)
    }
    others = {(ip, port) for ip, port in heard if ip not in ("127.0.0.1", "::1")}
    assert others
    open_ones = {port: said for ip, port in others if not asks(said := knock(ip, port))}
    assert open_ones == {}


METHODS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.CoreWorkerService/PushTask",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.ReporterService/GetTraceback",
    "ray.serve.ASGIService/HandleRequest",
)
"""One of each of Ray's services: a port has one or several of them."""


def knock(ip: str, port: int) -> set[str]:
    """What a stranger is told by gRPC, and by HTTP."""
    host = "[::1]" if ip == "::" else ip
    said = set()
    for method in METHODS:
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            try:
                channel.unary_unary(f"/{method}")(b"", timeout=10)
                said.add("ANSWERED")
            except grpc.RpcError as error:
                said.add(error.code().name)
    if said == {"UNAVAILABLE"}:  # no gRPC
        connection = http.client.HTTPConnection(ip, port, timeout=10)
        connection.request("GET", "/")
        said = {str(connection.getresponse().status)}
        connection.close()
    return said


def asks(said: set[str]) -> bool:
    return said in ({"401"}, {"UNAUTHENTICATED"}, {"UNAUTHENTICATED", "UNIMPLEMENTED"})


def test_no_word_of_a_history_is_logged(service: Service) -> None:
    word = "canary4711"
    query = {"client": "c0", "history": [word]}
    assert service.ask("POST", "/v1/recommend", query)[0] == 200
    assert service.ask("POST", "/v1/recommend", {**query, word: 1})[0] == 422
    sessions = {
        found.group()
        for process in service.driver.look()
        if (found := re.search(r"/tmp/ray/session_[0-9_-]+", title(process)))
    }
    (session,) = sessions
    logs = [file.read_bytes() for file in Path(session).rglob("*.log")]
    logs += [text.encode() for text in service.driver.text()]
    assert any(b'"route": "/v1/recommend", "status": 422' in log for log in logs)
    assert not any(word.encode() in log for log in logs)
    for secret in (service.operator, service.own):
        assert not any(secret.encode() in log for log in logs)


def test_it_ends_with_ctrl_c_and_leaves_nothing(service: Service) -> None:
    service.driver.look()
    service.driver.process.send_signal(signal.SIGINT)
    status, out, err = service.driver.finish(200)
    assert status in (0, 130), out + err
    assert service.driver.left() == []
