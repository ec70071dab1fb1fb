"""The porter over ASGI: a lost answer is asked for again, a stranger's steering is left out."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fellray.serve import porter
from fellray.serve.gate import Message, Receive, Scope, Send
from fellray.serve.porter import Porter

BODY = [
    {"type": "http.request", "body": b"one ", "more_body": True},
    {"type": "http.request", "body": b"body", "more_body": False},
]
GONE = {"type": "http.disconnect"}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porter, "PAUSE_S", 0.001)


class Behind:
    """An application that answers as its list says, one entry for each time it is asked."""

    def __init__(self, *answers: Any):
        self.answers = list(answers)
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        for message in answer:
            await send(message)


def tell(status: int, kind: str = "application/json", body: bytes = b"{}") -> list[Message]:
    headers = [(b"content-type", kind.encode())]
    start = {"type": "http.response.start", "status": status, "headers": headers}
    return [start, {"type": "http.response.body", "body": body, "more_body": False}]


def ask(
    app: Any,
    messages: Sequence[Message] = BODY,
    headers: Sequence[tuple[bytes, bytes]] = (),
    **scope: Any,
) -> list[Message]:
    """What is sent back."""
    left, sent = list(messages), []

    async def receive() -> Message:
        return left.pop(0) if left else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    whole = {"type": "http", "path": "/v1/runs", "headers": list(headers), **scope}
    asyncio.run(Porter(app)(whole, receive, send))
    return sent


def fault(sent: Sequence[Message]) -> tuple[int, str]:
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]


@pytest.mark.parametrize(
    "lost",
    [
        [],
        tell(200)[:1],
        [tell(200)[0], {"type": "http.response.body", "body": b"{", "more_body": True}],
        tell(500, "text/plain; charset=utf-8"),
        tell(503, "text/plain"),
        OSError("gone"),
    ],
)
def test_what_was_lost_is_asked_again(lost: Any) -> None:
    behind = Behind(lost, lost, tell(200, body=b'{"it": "came"}'))
    assert ask(behind) == tell(200, body=b'{"it": "came"}')
    assert behind.bodies == [b"one body"] * 3


@pytest.mark.parametrize("status", [200, 404, 422, 429, 503])
def test_an_answer_of_the_api_stands(status: int) -> None:
    behind = Behind(tell(status))
    assert ask(behind) == tell(status)


def test_what_stays_lost_is_told() -> None:
    behind = Behind(*[[]] * porter.TRIES)
    sent = ask(behind)
    assert fault(sent) == (503, "unavailable")
    assert (b"Retry-After", b"1") in sent[0]["headers"]
    assert len(behind.bodies) == porter.TRIES


def test_whoever_is_gone_is_not_asked_for() -> None:
    behind = Behind()
    assert ask(behind, [*BODY[:1], GONE]) == []
    assert behind.bodies == []

    class Watching(Behind):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await receive()
            assert (await receive()) == GONE
            self.bodies.append(b"")

    watching = Watching()
    assert ask(watching, [*BODY, GONE]) == []
    assert len(watching.bodies) == 1


def test_neither_body_nor_answer_is_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(porter, "BODY_S", 0.01)
    assert fault(ask(Behind(), BODY[:1])) == (408, "body_too_slow")
    monkeypatch.setattr(porter, "ANSWER_S", 0.01)

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Future()

    assert fault(ask(never)) == (503, "overloaded")


def test_a_long_body_is_passed_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porter, "MOST_KEPT", 3)
    behind = Behind([])
    assert fault(ask(behind)) == (503, "unavailable")
    assert behind.bodies == [b"one body"]


def test_no_stranger_steers_serve() -> None:
    kept = [
        (b"authorization", b"Bearer \xff"),
        (b"x-request-id", b"a-1"),
        (b"content-type", b"application/json"),
    ]
    dropped = [
        (b"x-request-id", b"\xff"),
        (b"X-Request-Id", b"a" * 300),
        (b"traceparent", b"\xff"),
        (b"serve_multiplexed_model_id", b"x"),
        (b"Serve-Multiplexed-Model-Id", b"x"),
        (b"x-session-id", b"x"),
        (b"x-request-timeout-seconds", b"0.001"),
        (b"x-request-disconnect-disabled", b"?1"),
    ]
    behind = Behind(tell(200))
    ask(behind, headers=[*dropped, *kept])
    assert behind.scopes[0]["headers"] == kept
    assert fault(ask(Behind(), path="*")) == (404, "no_such_route")
    assert ask(Behind(), type="websocket") == [{"type": "websocket.close", "code": 1008}]
    # how Serve itself is, is not asked for twice
    assert ask(Behind(tell(503, "text/plain")), path="/-/healthz") == tell(503, "text/plain")


def test_serve_finds_it() -> None:
    module, _, name = porter.PLACE.rpartition(".")
    place: Callable[[], Any] = getattr(porter, name)
    assert module == "fellray.serve.porter"
    assert [one.cls for one in place()] == [Porter]
