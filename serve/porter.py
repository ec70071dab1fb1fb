"""The porter, in front of Serve's own proxy: a request whose replica died is asked once more.

Everything that the API takes may be sent twice, so a lost answer costs time and no error; what
stays lost is refused as anything else is. Headers by which a stranger would steer Serve go no
further, and neither a body nor an answer is waited for without end. It must not know what is asked,
nor by whom.
"""

import asyncio
import logging
import re
from collections.abc import Iterator

from starlette.middleware import Middleware

from fellray.serve.gate import Asgi, Message, Receive, Scope, Send, answer
from fellray.serve.refusal import Refusal

SWITCH = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""The environment variable by which Serve is told, before it starts, whom to put in front."""
PLACE = f"{__name__}.place_porter"
"""What it is to be set to."""
TRIES = 6
PAUSE_S = 0.1
"""Before the second try; before each further one twice as long as before the last."""
BODY_S = 20.0
"""How long a body may take to come."""
ANSWER_S = 120.0
"""How long an answer may take, with all tries."""
MOST_KEPT = 4 * 2**20
"""Bytes of a body that are kept for a further try; what is longer is passed on once."""
ITS_OWN = "/-/"
"""Serve's own paths, which say how it is now."""

_STEERING = (
    b"serve-multiplexed-model-id",
    b"x-request-disconnect-disabled",
    b"x-request-timeout-seconds",
    b"x-session-id",
)
_NAMING = (b"traceparent", b"tracestate", b"x-request-id")
"""What Serve reads as text and writes to its log."""
_NAME = re.compile(rb"[!-~]{1,256}")
_LOST = (408, 500, 503)
"""What Serve itself answers where a replica did not; the API's own answers are JSON."""
_log = logging.getLogger("ray.serve")


def place_porter() -> list[Middleware]:
    """For Serve, which calls it in each process that listens."""
    return [Middleware(Porter)]


class Porter:
    """An ASGI application in front of another."""

    def __init__(self, app: Asgi):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or scope["path"].startswith(ITS_OWN):
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": list(_filter(scope))}
        try:
            if not scope["path"].startswith("/"):
                raise Refusal(404, "no_such_route", "a path begins with /")
            body = await _keep(receive)
            if body is None:
                return
            try:
                async with asyncio.timeout(ANSWER_S):
                    messages = await self._ask(scope, body, receive)
            except TimeoutError:
                raise Refusal(503, "overloaded", f"no answer within {ANSWER_S:g} s") from None
            for message in messages:
                await send(message)
        except Refusal as refusal:
            await answer(refusal, send)

    async def _ask(self, scope: Scope, body: list[Message], receive: Receive) -> list[Message]:
        """The messages of a whole answer; none where whoever asked is gone.

        Raises:
            Refusal: every try was lost.
        """
        whole = not body[-1].get("more_body")
        for tries in range(TRIES if whole else 1):
            if tries:
                await asyncio.sleep(PAUSE_S * 2 ** (tries - 1))
            again = _Again(body, receive)
            told: list[Message] = []

            async def take(message: Message, told: list[Message] = told) -> None:
                told.append(message)

            try:
                await self._app({**scope, "headers": list(scope["headers"])}, again.receive, take)
            except Exception:
                _log.exception("a request was lost")
            if again.gone:
                return []
            if _is_answer(told):
                return told
        raise Refusal(503, "unavailable", "whoever was to answer is gone; ask again")


class _Again:
    """A request that was read, once more; then what else comes: the end of the connection."""

    def __init__(self, body: list[Message], receive: Receive):
        self._left = body[::-1]
        self._receive = receive
        self.gone = False

    async def receive(self) -> Message:
        """See ASGI."""
        if self._left:
            return self._left.pop()
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message


def _filter(scope: Scope) -> Iterator[tuple[bytes, bytes]]:
    for name, value in scope["headers"]:
        plain = name.lower().replace(b"_", b"-")
        if plain not in _STEERING and (plain not in _NAMING or _NAME.fullmatch(value)):
            yield name, value


def refuse_late() -> Refusal:
    """That a body took too long to come."""
    return Refusal(408, "body_too_slow", f"the body did not come within {BODY_S:g} s")


async def _keep(receive: Receive) -> list[Message] | None:
    """The body, or as much of it as is kept; None: whoever sent it is gone.

    Raises:
        Refusal: it does not come.
    """
    messages: list[Message] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                messages.append(message)
                size += len(message.get("body", b""))
                if size > MOST_KEPT or not message.get("more_body"):
                    return messages
    except TimeoutError:
        raise refuse_late() from None


def _is_answer(messages: list[Message]) -> bool:
    """Whether it came whole, and from the API."""
    if len(messages) < 2 or messages[-1].get("more_body"):
        return False
    head = messages[0]
    kinds = [value for name, value in head["headers"] if name.lower() == b"content-type"]
    return head["status"] not in _LOST or kinds[:1] == [b"application/json"]
