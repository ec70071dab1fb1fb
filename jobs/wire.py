"""The wire: one HTTP/1.1 connection that is kept, one request at a time.

As little Python as a request can do with: what asks shares its cores with what answers. It must not
know what is asked, or when.
"""

import asyncio
from dataclasses import dataclass
from typing import cast

import httptools


@dataclass(frozen=True)
class Target:
    """A service, and the token that is shown to it."""

    host: str
    port: int
    token: str | None = None

    def write_request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """A request as it goes over the wire."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        if self.token is not None:
            lines.append(f"Authorization: Bearer {self.token}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Connection(asyncio.Protocol):
    """Opened by `connect`. `ask` again only after the last answer."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._waiting: asyncio.Future[tuple[int, bytes]] | None = None
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)
        self.open = False

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body.

        Raises:
            ConnectionError: it was closed before the answer was whole.
        """
        assert self._transport is not None
        assert self._waiting is None
        if not self.open:
            raise ConnectionResetError("closed between two requests")
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._waiting
        finally:
            self._waiting = None

    def close(self) -> None:
        """Nobody asks any more."""
        self.open = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        # uvloop's are none of asyncio's classes
        self._transport, self.open = cast(asyncio.WriteTransport, transport), True

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.open = False
        self._fail(ConnectionResetError("closed while an answer was awaited"))

    def on_message_begin(self) -> None:
        """See `httptools.HttpResponseParser`."""
        self._body.clear()

    def on_body(self, body: bytes) -> None:
        """See `httptools.HttpResponseParser`."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """See `httptools.HttpResponseParser`."""
        self.open = self.open and self._parser.should_keep_alive()
        status, body = self._parser.get_status_code(), b"".join(self._body)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result((status, body))

    def _fail(self, error: Exception) -> None:
        if self._transport is not None:
            self._transport.close()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)


async def connect(target: Target) -> Connection:
    """Raises:
    OSError: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, target.host, target.port)
    return connection
