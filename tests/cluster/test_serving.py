"""`fellray serve` on a Ray of its own, over HTTP: answers, refusals, live rounds, sockets, page."""

import asyncio
import http.client
import json
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from browser import browse, find_browser
from contract import run_schemathesis
from driver import Driver, plain_environment, title, wait_until
from shown import CONTRAST, Shown, hidden, text
from strangers import Attempt, Stranger, attempts, leaks, try_all, twins
from texts import draw_query

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.ports import find_ports
from fellray.jobs.train import one_round
from fellray.platform.config import RunConfig
from fellray.platform.promotion import promote, roll_back
from fellray.platform.run import open_run, read_run
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve.args import Args
from fellray.serve.client import Client
from fellray.serve.listings import NewItem
from fellray.serve.schema import Answer, ByHistory, ByUser, Refused
from fellray.serve.tokens import new_token
from fellray.serve.transport import ServiceError
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
    (port,) = find_ports(1)
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


STEERING = (
    ("X-Request-ID", "\u00ff\u00fe"),
    ("serve_multiplexed_model_id", "\u00ff"),
    ("serve-multiplexed-model-id", "other"),
    ("X-Session-Id", "\u00ff"),
    ("X-Request-Timeout-Seconds", "0.000001"),
    ("X-Request-Timeout-Seconds", "\u00ff"),
    ("X-Request-Disconnect-Disabled", "\u00ff"),
)
"""Headers that Ray Serve reads, with which a stranger could cause a 500 or a 408."""


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
    operator = Stranger(service.port, service.operator)
    for name, value in STEERING:
        said = operator.send(Attempt("GET", "/v1/runs", headers=((name, value),)))
        assert said.status == 200, (name, said)
    upgrade = (("Connection", "Upgrade"), ("Upgrade", "websocket"))
    upgrade += (("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="))
    assert operator.send(Attempt("GET", "/v1/runs", headers=upgrade)).status == 403
    operator.close()
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


def test_an_event_is_part_of_the_next_request(service: Service, tiny_data: Path) -> None:
    user = int(Dataset(tiny_data).shard("c0").users[0])
    query = {"client": "c0", "user_id": user}
    before = service.ask("POST", "/v1/recommend", query, service.own)[1]["items"][0]["item_id"]
    event = {"event_id": "one", **query, "item_id": before, "timestamp": 1_700_000_000}
    for told in ({"stored": 1, "known": 0}, {"stored": 0, "known": 1}):
        answer = service.ask("POST", "/v1/events", {"events": [event]}, service.own)
        assert answer == (200, told)
    after = service.ask("POST", "/v1/recommend", {**query, "k": 50}, service.own)[1]["items"]
    assert before not in [item["item_id"] for item in after]
    other = {"events": [{**event, "client": "c1"}]}
    assert service.ask("POST", "/v1/events", other, service.own)[0] == 403


def test_a_round_is_taken_over_while_it_answers(service: Service) -> None:
    storage = read_run(service.folder).storage
    query = {"client": "c0", "history": ["word01", "word02 word03"]}

    def answer() -> tuple[int, Any]:
        status, found = service.ask("POST", "/v1/recommend", query, service.own)
        assert status == 200
        return found["round"], found["items"]

    assert answer()[0] == LAST
    promote(storage, 0, lambda: [0, 1, 2])
    wait_until(lambda: answer()[0] == 0, 5, "round 0 is served")
    start = answer()
    roll_back(storage)
    wait_until(lambda: answer()[0] == LAST, 5, "the last round is served again")
    assert answer()[1] != start[1]


@pytest.mark.long
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


@pytest.mark.parametrize("count", [200, pytest.param(5_000, marks=pytest.mark.long)])
@pytest.mark.parametrize(("own", "other"), [("c0", "c1"), ("c3", "c0")])
def test_another_clients_token_opens_nothing(
    service: Service, tiny_data: Path, own: str, other: str, count: int
) -> None:
    """Whether what is asked for is there cannot be told either."""
    data = Dataset(tiny_data)
    user = int(data.shard(other).users[0])
    item = int(data.item_ids[data.shard(other).items[0]])
    assert user not in data.shard(own).users
    stranger = Stranger(service.port, new_token(Storage(service.folder), own))
    wait_until(lambda: service.ask("GET", "/v1/runs", token=stranger.token)[0] == 200, 5, "known")
    wanted = attempts(own, other, user, item, random.Random(count))
    statuses, successes = try_all(
        stranger, wanted, count, lambda said: leaks(said, own, data.clients, user)
    )
    print(f"{count} attempts of {own} on {other}: {len(successes)} successes, {dict(statuses)}")
    assert successes == []
    assert max(statuses) < 500
    for there, not_there in twins(other, user, item):
        assert stranger.send(there) == stranger.send(not_there), (there, not_there)
    stranger.close()
    # the attempts are good ones: whoever may ask is answered
    allowed = Stranger(service.port, service.operator)
    reads = (one for one in wanted if not one.target.startswith(("/v1/events", "/v1/items")))
    statuses, successes = try_all(
        allowed, reads, 200, lambda said: leaks(said, own, data.clients, user)
    )
    assert len(successes) > 5
    allowed.close()


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
        *("no-op", "stock no-op", "roomy stock no-op"),
    }
    assert all(arm["throughput"][0] > 0 for arm in results["arms"].values())
    assert not any(arm["errors"] for arm in results["arms"].values())
    few, many = results["adapters"]
    assert few["errors"] == many["errors"] == {}
    assert many["hit_rate"][0] < 1
    assert len(results["figures"]) == 7
    assert bench.left() == []


def test_every_socket_is_this_machines_or_asks_for_a_credential(service: Service) -> None:
    check_sockets(service)


def check_sockets(service: Service) -> None:
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


@pytest.fixture(scope="module")
def shown(
    service: Service, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shown]:
    program = find_browser()
    if program is None:
        pytest.skip(
            "no Chromium on this machine: install one (Debian: apt-get install chromium), or name "
            "it in the environment's CHROMIUM"
        )
    tokens = {"operator": service.operator, "c0": service.own}
    tokens["c1"] = new_token(Storage(service.folder), "c1")
    with browse(program, tmp_path_factory.mktemp("browser")) as page:
        page.look(1400, 900, calm=True)
        yield Shown(page, f"http://127.0.0.1:{service.port}/", Dataset(tiny_data), tokens)


MARKUP = "<script>window.hurt=1</script><img src=x onerror=window.hurt=1> word07"
"""A title that must stay a text."""


def test_a_user_of_a_client(shown: Shown, tmp_path: Path) -> None:
    page = shown.page
    shown.enter("operator")
    assert page.run("document.activeElement.id") == "client"
    user = str(shown.data.shard("c0").users[0])
    assert page.run("[client.value, user.value]") == ["c0", user]
    # by keyboard alone: another client from the list, then the button
    page.press("ArrowDown", "ArrowDown")
    active = "client.getAttribute('aria-activedescendant')"
    page.wait(f"{active} === 'client-options-1'")
    page.press("Enter")
    page.wait("client.value === 'c1'")
    user = str(shown.data.shard("c1").users[0])
    page.wait(f"user.value === '{user}'")
    page.press("Tab", "Tab", "Tab", "Tab")
    assert page.run("document.activeElement.textContent") == "Recommend"
    page.press("Enter")
    page.wait(f"!{hidden('past')}")
    rows = shown.rows()
    with Client(shown.url, shown.tokens["c1"]) as client:
        answer = client.recommend("c1", user_id=int(user))
        past = client.past("c1", int(user))
    assert rows == [[str(p.rank), p.title, f"{p.score:.3f}"] for p in answer.items]
    assert f"10 items for user {user} of c1" in shown.read("status")
    assert f"the client's own adapters of round {answer.round}" in shown.read("status")
    chosen = "document.querySelector('#ladder [aria-current]').textContent"
    assert page.run(chosen) == "own adapters"
    met = page.run("[...document.querySelectorAll('#past-items li')].map(e => e.textContent)")
    assert met == [item.title for item in past.items]
    assert page.run("document.querySelectorAll('#quality-chart rect').length") == 5
    page.wait("Number(document.querySelectorAll('#live-figures dd')[1].textContent) > 0")
    assert page.complaints == []
    assert {address for address in page.requests if not address.startswith(shown.url)} == set()
    token = shown.tokens["operator"]
    assert not any(token in address for address in page.requests)
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    assert page.run(kept) == '[{},{},""]'
    page.shoot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_history_and_a_title_that_is_markup(shown: Shown) -> None:
    page = shown.page
    with Client(shown.url, shown.tokens["operator"]) as client:
        added = client.add_items([NewItem(item_id=2**60 + 1, title=MARKUP)])
        assert added.items == len(shown.data.titles) + 1
        assert client.item(2**60 + 1).title == MARKUP
        known = client.items("word07")[0]
    shown.enter("operator")
    page.run("document.getElementById('by-history').focus()")
    page.press(" ", "Tab", "Tab")
    assert page.run("document.activeElement.id") == "title"
    page.type("<script")
    page.wait("document.querySelectorAll('#title-options li').length === 1")
    page.press("ArrowDown", "Enter")  # an id that JavaScript's numbers cannot hold
    page.type("word09 word08")
    page.press("Enter")
    page.type("word07")
    page.wait("document.querySelectorAll('#title-options li').length > 1")
    page.press("ArrowDown", "Enter")
    entries = "[...document.querySelectorAll('#history li span')].map(e => e.textContent)"
    assert page.run(entries) == [MARKUP, "word09 word08", known.title]
    page.run("document.getElementById('seen').click()")
    page.run("document.getElementById('k').value = 60")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait("document.querySelectorAll('#ranking tbody tr').length > 20")
    assert "for this history at c0" in shown.read("status")
    with Client(shown.url, shown.tokens["operator"]) as client:
        history: list[int | str] = [2**60 + 1, "word09 word08", known.item_id]
        query = ByHistory(client="c0", history=history, k=60, filters={"seen": False})
        (answer,) = client.recommend_batch([query])
    assert [row[1] for row in shown.rows()] == [place.title for place in answer.items]
    assert MARKUP in [row[1] for row in shown.rows()]
    assert page.run("window.hurt") is None
    assert page.run("document.querySelectorAll('main img, main script').length") == 0
    # even a slip of the page's own would not make markup of it
    slip = "try { document.body.innerHTML = '<b>x</b>'; 'made' } catch (e) { e.name }"
    assert page.run(slip) == "TypeError"
    page.press("Shift+Tab")
    assert shown.page.complaints[1:] == []  # the policy says once that it refused the slip


def test_tokens_that_open_less(shown: Shown) -> None:
    page = shown.page
    shown.enter("wrong")
    assert "This token opens nothing" in shown.read("door-problem")
    assert page.run(f"{hidden('inside')} && document.activeElement.id") == "token"
    shown.enter("c1")
    assert page.complaints == []
    assert page.run("[client.value, client.readOnly]") == ["c1", True]
    assert page.run("document.querySelectorAll('#quality-chart rect').length") == 1
    assert "operator's token" in shown.read("live-words")
    page.run("client.readOnly = false; client.value = 'c0'")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"{text('problem')} !== ''")
    assert "another client's" in shown.read("problem")
    page.run("client.value = 'c1'; user.value = '999'")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"{text('problem')}.includes('no such user')")
    page.run("user.value = 'x'")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"{text('problem')}.includes('whole numbers')")
    assert page.run("user.getAttribute('aria-invalid')") == "true"
    page.run("document.getElementById('leave').click()")
    assert page.run(f"{hidden('inside')} && token.value") == ""
    assert shown.rows() == []
    with Client(shown.url, "wrong") as client, pytest.raises(ServiceError, match="401") as told:
        client.runs()
    assert told.value.code == "wrong_token"


@pytest.mark.parametrize(
    ("status", "words"), [(429, "in 7 s"), (422, "no sense (k)"), (0, "reach")]
)
def test_what_the_service_says_is_told(shown: Shown, status: int, words: str) -> None:
    """Answers that a test cannot cause at will are put in the network's place."""
    page = shown.page
    shown.enter("c0")
    error = {"error": {"code": "x", "message": "no sense", "field": "k"}}
    answer = f"""new Response({json.dumps(json.dumps(error))},
        {{status: {status}, headers: {{"Retry-After": "7"}}}})"""
    page.run(
        f"window.fetch = async () => {{ {f'return {answer}' if status else 'throw TypeError()'} }}"
    )
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"{text('problem')} !== ''")
    assert words in shown.read("problem")


def test_a_service_that_is_back_is_not_said_to_be_lost(shown: Shown) -> None:
    """What the page asks by itself has a line of its own, and leaves the form's alone."""
    page = shown.page
    shown.enter("c0")
    page.run("user.value = 'x'")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"{text('problem')}.includes('whole numbers')")
    page.run("window.whole = window.fetch; window.fetch = async () => { throw TypeError() }")
    page.wait(f"{text('live-problem')}.includes('reach')")
    page.run("window.fetch = window.whole")
    page.wait(f"{text('live-problem')} === ''")
    assert "whole numbers" in shown.read("problem")


@pytest.mark.parametrize(("width", "dark"), [(320, False), (700, True), (1400, True)])
def test_it_fits_and_can_be_read(shown: Shown, width: int, dark: bool) -> None:
    """320 pixels are 1,280 at 400 %; 700 are 1,400 at 200 %. Contrast as WCAG 2.2 AA counts it."""
    page = shown.page
    page.look(width, 450, dark=dark)
    shown.enter("operator")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"!{hidden('past')}")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run(CONTRAST) == []
    page.look(1400, 900, calm=True)


def test_everything_is_in_reach_of_a_keyboard(shown: Shown) -> None:
    """Tab goes through all controls, in the order in which they stand, and each has a name."""
    page = shown.page
    shown.enter("operator")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"!{hidden('past')}")
    page.run("document.body.tabIndex = -1; document.body.focus()")
    met: list[Any] = []
    for _ in range(20):
        page.press("Tab")
        name = "((e) => e === document.body ? null : [e.tagName, e.id || e.textContent.trim()])"
        if (found := page.run(f"{name}(document.activeElement)")) is None or found in met:
            break
        met.append(found)
    assert met == [
        ["BUTTON", "leave"],
        ["INPUT", "by-user"],
        ["INPUT", "client"],
        ["INPUT", "user"],
        ["INPUT", "k"],
        ["INPUT", "seen"],
        ["BUTTON", "Recommend"],
        ["SUMMARY", "As a table"],
        ["A", "The API"],
    ]
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "combobox", "textbox", "spinbutton", "checkbox", "radio", "table", "image"}
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"]
        and node["role"]["value"] in roles
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []


@pytest.mark.parametrize(
    ("seed", "cases", "options"),
    [
        (1, 3, ("--phases=fuzzing",)),
        *(
            pytest.param(seed, 350, (), marks=[pytest.mark.long, pytest.mark.timeout(3000)])
            for seed in (11, 12, 13)
        ),
    ],
)
def test_it_keeps_to_its_document(
    service: Service, tmp_path: Path, seed: int, cases: int, options: tuple[str, ...]
) -> None:
    """schemathesis with all checks; the long ones are 20,000 requests, and memory stays flat.

    It adds items, so it comes after the page's tests.
    """
    before = pss_mib(service)
    count, found = run_schemathesis(
        service.port, service.operator, tmp_path, seed, cases, "--rate-limit=150/s", *options
    )
    after = pss_mib(service)
    print(f"seed {seed}: {count} cases; PSS {before:.0f} MiB before, {after:.0f} MiB after")
    assert found == ""
    assert count >= 6 * cases
    assert after < 1.1 * before + 20


@pytest.mark.parametrize(
    "count",
    [200, pytest.param(6000, marks=[pytest.mark.long, pytest.mark.timeout(1500)])],
)
def test_any_text_is_read_or_refused(service: Service, tiny_data: Path, count: int) -> None:
    """Every answer is one of the document's; never a 500."""
    data, draw, met = Dataset(tiny_data), random.Random(count), Counter[int]()
    stranger = Stranger(service.port, service.operator)
    before = pss_mib(service)
    for _ in range(count):
        body = draw_query(draw, data.titles, data.item_ids.tolist())
        said = stranger.send(Attempt("POST", "/v1/recommend", body))
        met[said.status] += 1
        assert said.status in (200, 404, 413, 422), (said, body)
        kind = Answer if said.status == 200 else Refused
        kind.model_validate_json(said.body)
    stranger.close()
    print(f"{count} requests: {dict(met)}; PSS {before:.0f} MiB, then {pss_mib(service):.0f} MiB")
    assert met[200] > count / 10
    assert met[422] > count / 20


def pss_mib(service: Service) -> float:
    """Of all processes of the service."""
    total = 0
    for process in [*service.driver.look(), psutil.Process(service.driver.process.pid)]:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total / 2**20


def test_it_ends_with_ctrl_c_and_leaves_nothing(service: Service) -> None:
    service.driver.look()
    service.driver.process.send_signal(signal.SIGINT)
    status, out, err = service.driver.finish(200)
    assert status in (0, 130), out + err
    assert service.driver.left() == []
