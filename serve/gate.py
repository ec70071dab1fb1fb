"""The gate before the API: who asks, how much, how often; one line of log for each request.

Whoever has no token learns nothing, not even whether a body is well formed. The log tells route,
status and time, never a body, a token or a query. It must not know what is recommended.
"""

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fellray.serve.counters import Counters
from fellray.serve.page import PATHS
from fellray.serve.refusal import Refusal
from fellray.serve.tokens import Bucket, Caller, Tokens

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/healthz", "/readyz", "/openapi.json", *PATHS})
"""Paths that ask for no token: they tell nothing of clients or users."""
OTHER = "other"
"""The route of a path that is none: paths are the asker's words, and not logged."""
CALLER = "fellray.caller"
"""Where in a request's scope its caller stands."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"})

_log = logging.getLogger("fellray.serve")
access = logging.getLogger("fellray.access")


class Gate:
    """An ASGI application in front of another."""

    def __init__(
        self,
        app: Asgi,
        tokens: Callable[[], Tokens],
        bucket: Bucket,
        counters: Counters,
        body_bytes: int,
    ):
        """Args: tokens: the ones that count now. body_bytes: largest body."""
        self._app = app
        self._tokens = tokens
        self._bucket = bucket
        self._counters = counters
        self._body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
                return
            raise Refusal(403, "no_websocket", "there are no WebSockets here")
        began = time.monotonic()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        caller: Caller | None = None
        try:
            caller = self._admit(scope)
            scope[CALLER] = caller
            body = await self._read(scope, receive)
            await self._app(scope, _replay(body, receive), watched)
        except Refusal as refusal:
            await answer(refusal, watched)
        except Exception:
            _log.exception("a request failed")
            if status:
                raise
            await answer(Refusal(503, "failed", "something went wrong; the log has it"), watched)
        finally:
            route = getattr(scope.get("route"), "path", OTHER)
            method = scope["method"] if scope["method"] in _METHODS else OTHER
            seconds = time.monotonic() - began
            self._counters.count(method, route, status, seconds)
            line = {
                "method": method,
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 1),
                "token": caller.digest[:8] if caller else None,
            }
            access.info(json.dumps(line))

    def _admit(self, scope: Scope) -> Caller | None:
        if scope["path"] in OPEN:
            return None
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if not given:
            raise Refusal(401, "no_token", "send a token: Authorization: Bearer ...")
        kind, _, token = given[0].decode("latin-1").partition(" ")
        caller = self._tokens().find(token.strip()) if kind.lower() == "bearer" else None
        if caller is None or len(given) > 1:
            raise Refusal(401, "wrong_token", "this token does not open anything")
        charge(self._bucket, caller)
        return caller

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        # what is said to be too large is not read at all
        if declared.isdigit() and int(declared[:12]) > self._body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":  # gone before all was said
                return b"".join(parts)
            part = message.get("body", b"")
            size += len(part)
            if size > self._body_bytes:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> Refusal:
        return Refusal(413, "body_too_large", f"a body has at most {self._body_bytes} bytes")


def charge(bucket: Bucket, caller: Caller, queries: int = 1, counted: int = 0) -> None:
    """Count a request's queries. Args: counted: as in `Bucket.take`.

    Raises:
        Refusal: they are more than the caller may ask now.
    """
    if (wait_s := bucket.take(caller, queries, counted)) > 0:
        why = f"ask again in {wait_s:.2f} s"
        raise Refusal(429, "too_many_requests", why, wait_s=wait_s)


async def answer(refusal: Refusal, send: Send) -> None:
    """Send a refusal as the whole response."""
    body = json.dumps(refusal.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(n.encode(), v.encode()) for n, v in headers_of(refusal).items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def headers_of(refusal: Refusal) -> Mapping[str, str]:
    """What a status asks for beside the body."""
    later = {"Retry-After": str(max(1, math.ceil(refusal.wait_s)))}
    own = {
        401: {"WWW-Authenticate": "Bearer"},
        408: {"Connection": "close"},  # the rest of a body would be read as another request
        413: {"Connection": "close"},
        415: {"Accept": "application/json"},
        429: later,
        503: later,
    }
    return own.get(refusal.status, {})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that was read, once more; then what else comes, the end of the connection."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again
