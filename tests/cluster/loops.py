"""A closed loop over HTTP that lasts while something happens, and what came of each request."""

import http.client
import itertools
import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sent:
    """One request."""

    began: float
    """`time.monotonic()`"""
    ended: float
    query: int
    status: int | str
    """Of HTTP, or the name of what broke the connection."""
    answer: Any


@dataclass
class Loop:
    """So many connections, each with one request on its way."""

    port: int
    token: str
    queries: Sequence[Mapping[str, Any]]
    tls: ssl.SSLContext | None = None
    """For HTTPS."""
    sent: list[Sent] = field(default_factory=list)
    """In the order of their ends."""

    @contextmanager
    def running(self, connections: int = 8) -> Iterator["Loop"]:
        """Until the block ends."""
        ended = threading.Event()
        turn = itertools.count()
        threads = [
            threading.Thread(target=self._work, args=(ended, turn)) for _ in range(connections)
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    def _work(self, ended: threading.Event, turn: Iterator[int]) -> None:
        at = ("127.0.0.1", self.port)
        if self.tls is None:
            connection = http.client.HTTPConnection(*at, timeout=60)
        else:
            connection = http.client.HTTPSConnection(*at, timeout=60, context=self.tls)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        while not ended.is_set():
            at = next(turn) % len(self.queries)
            body = json.dumps(self.queries[at])
            began = time.monotonic()
            answer: Any = None
            try:
                connection.request("POST", "/v1/recommend", body, headers)
                response = connection.getresponse()
                status: int | str = response.status
                text = response.read()
                with suppress(ValueError):
                    answer = json.loads(text)
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
                connection.close()
            self.sent.append(Sent(began, time.monotonic(), at, status, answer))
        connection.close()

    def failed(self) -> list[Sent]:
        """What was not answered."""
        return [one for one in self.sent if one.status != 200]

    def p99_s(self, first: float, last: float) -> float:
        """Of the requests that ended between these times."""
        took = [one.ended - one.began for one in self.sent if first <= one.ended < last]
        return float(np.percentile(took, 99)) if took else float("inf")

    def in_flight(self, when: float) -> int:
        """Requests on their way."""
        return sum(one.began <= when <= one.ended for one in self.sent)

    def back_within_s(self, when: float, usual_s: float) -> float:
        """Seconds from `when` until p99 of any two seconds, a hundred requests and more, is at most
        `usual_s`, and stays so."""
        last = max(one.ended for one in self.sent)
        windows = np.arange(when, last - 2, 0.5)
        slow = [start for start in windows if self.p99_s(start, start + 2) > usual_s]
        return float(slow[-1] + 0.5 - when) if slow else 0.0
