"""Bytes to a service and back: one connection that is kept, a token, timeouts, further tries.

It must not know what is asked.
"""

import http.client
import json
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

from fellray.platform.errors import FellrayError

AGAIN = (429, 503)
"""Statuses that pass: the request is sent again, after what the service says or a growing pause."""
LONGEST_PAUSE_S = 30.0


class ServiceError(FellrayError):
    """The service refused, or cannot be reached."""

    def __init__(self, message: str, status: int | None = None, body: Any = None):
        super().__init__(message)
        self.status = status
        """Of the response; None: there was none."""
        self.body = body
        """What it said: JSON as values, else text."""
        error = body.get("error") if isinstance(body, dict) else None
        error = error if isinstance(error, dict) else {}
        self.code: str | None = error.get("code")
        self.field: str | None = error.get("field")


class Transport:
    """One service, asked with one token by one thread at a time."""

    def __init__(
        self,
        url: str,
        token: str | None,
        timeout_s: float,
        tries: int,
        tls: ssl.SSLContext | None,
    ):
        """Nothing is sent yet. Args: as `serve.client.Client`.

        Raises:
            FellrayError: the URL or the token is none.
        """
        try:
            parts = urlsplit(url)
            self._address = (parts.hostname or "", parts.port)
        except ValueError:  # a port that is none
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise FellrayError(f"{url!r}: is no address of a service; write http://127.0.0.1:8000")
        if token and not (token.isascii() and token.isprintable()):
            raise FellrayError("the token is none: it has letters, digits, - and _ only")
        self.url = url
        self._token = token
        self._secure = parts.scheme == "https"
        self._base = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._tries = max(1, tries)
        self._tls = tls
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        """End the connection; a later request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def ask(self, method: str, target: str, data: bytes | None = None) -> bytes:
        """The body of an answer of status 200. Args: target: path and query. data: JSON.

        Raises:
            ServiceError: the service refused, or cannot be reached.
        """
        for tries in range(1, self._tries + 1):
            last = tries == self._tries
            try:
                status, after, raw = self._send(method, self._base + target, data)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # the kept connection may have been ended meanwhile
                if last or not isinstance(error, ConnectionError):
                    why = str(error) or type(error).__name__
                    raise ServiceError(f"{self.url}: cannot be reached ({why})") from error
                time.sleep(_pause_s(tries, None))
                continue
            if status == 200:
                return raw
            if last or status not in AGAIN:
                raise self._refusal(status, raw)
            time.sleep(_pause_s(tries, after))
        raise AssertionError("the last try returns or raises")

    def _send(self, method: str, target: str, data: bytes | None) -> tuple[int, str | None, bytes]:
        if self._connection is None:
            host, port = self._address
            self._connection = (
                http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._tls)
                if self._secure
                else http.client.HTTPConnection(host, port, timeout=self._timeout_s)
            )
        headers = {"Accept": "application/json"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        self._connection.request(method, target, data, headers)
        response = self._connection.getresponse()
        return response.status, response.headers["Retry-After"], response.read()

    def _refusal(self, status: int, raw: bytes) -> ServiceError:
        text = raw.decode(errors="replace")
        try:
            body = json.loads(text)
            said = body["error"]
            field = f" ({said['field']})" if said["field"] else ""
            message = f"{said['message']}{field}"
        except (ValueError, KeyError, TypeError):
            body, message = text, text[:200]
        return ServiceError(f"{self.url}: {status}: {message}", status, body)


def _pause_s(tries: int, said: str | None) -> float:
    """What the service says in seconds, or 0.1 s, 0.2 s, 0.4 s and so on."""
    if said is not None and said.isdecimal():
        return min(float(said), LONGEST_PAUSE_S)
    return min(0.1 * 2.0 ** (tries - 1), LONGEST_PAUSE_S)
