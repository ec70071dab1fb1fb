"""The Python client against a service of canned answers: what is sent, retried, told."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fellray.platform.errors import FellrayError
from fellray.serve import transport
from fellray.serve.client import Client
from fellray.serve.listings import NewItem
from fellray.serve.schema import ByHistory, Filters, NewEvent, Receipt
from fellray.serve.transport import ServiceError

ANSWER = {
    "run": "demo",
    "round": 2,
    "client": "c0",
    "layer": "client",
    "items": [{"rank": 1, "item_id": 7, "title": "Alien (1979)", "score": 1.5}],
}


class Service(ThreadingHTTPServer):
    """Answers with what it was given, in turn, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, dict[str, str], Any]] = []
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.connections: set[tuple[str, int]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, Service)
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        heads = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.command, self.path, heads, json.loads(raw) if raw else None))
        self.server.connections.add(self.client_address)
        status, own, body = self.server.answers.pop(0)
        if status == 0:  # gone without a word
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in own.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *words: Any) -> None:
        """Nothing."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    kept: list[float] = []
    monkeypatch.setattr(transport.time, "sleep", kept.append)
    return kept


def refused(status: int, code: str, field: str | None = None) -> tuple[int, dict[str, str], Any]:
    return status, {}, {"error": {"code": code, "message": "no", "field": field}}


def test_what_is_sent_and_what_comes_back(service: Service) -> None:
    with Client(service.url + "/base/", token="secret") as client:
        service.answers = [(200, {}, ANSWER), (200, {}, {"answers": [ANSWER]})]
        answer = client.recommend("c0", user_id=5, k=3, filters=Filters(seen=False), as_of="test")
        assert (answer.items[0].title, answer.layer, answer.round) == ("Alien (1979)", "client", 2)
        batch = client.recommend_batch([ByHistory(client="c0", history=["Alien", 3])])
        assert batch == [answer]
    (method, path, heads, body), second = service.asked
    assert (method, path) == ("POST", "/base/v1/recommend")
    assert heads["authorization"] == "Bearer secret"
    assert body == {
        "client": "c0",
        "k": 3,
        "filters": {"seen": False},
        "user_id": 5,
        "as_of": "test",
    }
    assert second[3]["queries"][0]["history"] == ["Alien", 3]
    assert len(service.connections) == 1  # one connection for both


def test_names_are_one_part_of_a_path(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FELLRAY_TOKEN", "from-the-environment")
    state = {"client": "a", "users": 1, "round": 0, "layer": "mean", "validation_ndcg_at_10": None}
    service.answers = [(200, {}, state), (200, {}, {"items": []}), (200, {}, {"status": "ok"})]
    with Client(service.url) as client:
        client.client("a/../b?c")
        assert client.items("x&limit=9") == []
        assert client.health().status == "ok"
    assert [asked[1] for asked in service.asked] == [
        "/v1/clients/a%2F..%2Fb%3Fc",
        "/v1/items?title=x%26limit%3D9&limit=20",
        "/healthz",
    ]
    assert service.asked[0][2]["authorization"] == "Bearer from-the-environment"


def test_events_are_sent_together(service: Service) -> None:
    event = NewEvent(event_id="e1", client="c0", user_id=5, item_id=7, timestamp=9)
    service.answers = [(200, {}, {"stored": 1, "known": 1})]
    with Client(service.url, "t") as client:
        assert client.add_events([event, event]) == Receipt(stored=1, known=1)
        with pytest.raises(FellrayError, match="events: "):
            client.add_events([])
    (asked,) = service.asked
    assert asked[:2] == ("POST", "/v1/events")
    assert asked[3] == {"events": [event.model_dump()] * 2}


def test_what_passes_is_asked_again(service: Service, pauses: list[float]) -> None:
    busy = (429, {"Retry-After": "3"}, {"error": {}})
    service.answers = [busy, refused(503, "overloaded"), (0, {}, None), (200, {}, {"runs": []})]
    with Client(service.url, "t") as client:
        assert client.runs() == []
        assert pauses == [3.0, 0.2, 0.4]
        service.answers = [refused(503, "not_ready")] * 4
        with pytest.raises(ServiceError) as told:
            client.runs()
        assert (told.value.status, told.value.code, len(service.asked)) == (503, "not_ready", 8)


def test_a_refusal_carries_what_the_service_said(service: Service, pauses: list[float]) -> None:
    service.answers = [refused(404, "unknown_user", "user_id"), (502, {}, b"<html>bad gateway")]
    with Client(service.url, "t") as client:
        with pytest.raises(ServiceError, match=r"404: no \(user_id\)") as told:
            client.recommend("c0", user_id=1)
        assert (told.value.code, told.value.field) == ("unknown_user", "user_id")
        assert told.value.body["error"]["message"] == "no"
        with pytest.raises(ServiceError, match="502") as told:
            client.runs()
        assert (told.value.code, told.value.body) == (None, "<html>bad gateway")
        service.answers = [(200, {}, {"runs": 3})]
        with pytest.raises(ServiceError, match="something else"):
            client.runs()
    assert pauses == []


def test_nobody_there(pauses: list[float]) -> None:
    client = Client("http://127.0.0.1:1", "t", tries=2)
    with pytest.raises(ServiceError, match="cannot be reached") as told:
        client.health()
    assert (told.value.status, pauses) == (None, [0.1])


def test_whoever_is_silent_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: held.wait(10))
    try:
        with (
            Client(service.url, timeout_s=0.1) as client,
            pytest.raises(ServiceError, match="timed"),
        ):
            client.health()
    finally:
        held.set()


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://x?y", "http://x:y"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(FellrayError, match="no address"):
        Client(url)


def test_what_does_not_fit_is_not_sent() -> None:
    client = Client("http://127.0.0.1:1", "t")
    for wrong in ({}, {"user_id": 1, "history": []}):
        with pytest.raises(FellrayError, match="one of them"):
            client.recommend("c0", **wrong)
    with pytest.raises(FellrayError, match=r"^k: "):
        client.recommend("c0", user_id=1, k=0)
    with pytest.raises(FellrayError, match="queries: "):
        client.recommend_batch([])
    with pytest.raises(FellrayError, match="items: "):
        client.add_items([NewItem(item_id=at, title="x") for at in range(65)])
    with pytest.raises(FellrayError, match="token"):
        Client("http://127.0.0.1:1", "a\nb")
