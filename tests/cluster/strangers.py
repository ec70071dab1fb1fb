"""Attempts on what is another client's, with a valid token: routes, spellings, mixtures.

Each is a request and what of the other client's it is about; the pairs of `twins` differ only in
whether what they ask for is there, and must be answered alike.
"""

import http.client
import itertools
import json
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote


@dataclass(frozen=True)
class Attempt:
    method: str
    target: str
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Said:
    """An answer."""

    status: int
    headers: tuple[tuple[str, str], ...]
    """Without those that differ each time."""
    body: bytes


class Stranger:
    """Somebody with the token of one client, and that only."""

    def __init__(self, port: int, token: str):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.token = token

    def send(self, attempt: Attempt) -> Said:
        """What is answered, once the token may ask so often."""
        while (said := self._send(attempt)).status == 429:
            time.sleep(0.1)
        return said

    def _send(self, attempt: Attempt) -> Said:
        """Over one connection, which is opened again when it was ended."""
        connection = self._connection
        connection.putrequest(attempt.method, attempt.target, skip_accept_encoding=True)
        connection.putheader("Authorization", f"Bearer {self.token}")
        for name, value in attempt.headers:
            connection.putheader(name, value.encode("latin-1", "replace"))
        if attempt.body is not None:
            if not any(name == "Content-Type" for name, _ in attempt.headers):
                connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(attempt.body)))
        connection.endheaders(attempt.body)
        response = connection.getresponse()
        changing = ("date", "x-request-id")
        headers = sorted((k.lower(), v) for k, v in response.getheaders())
        kept = tuple(pair for pair in headers if pair[0] not in changing)
        said = Said(response.status, kept, response.read())
        if response.will_close:
            connection.close()
        return said

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def spell(name: str) -> list[str]:
    """Ways to write a name that somebody might take for the same."""
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name)
    forms: Sequence[Any] = ("NFC", "NFD", "NFKC", "NFKD")
    spelled = [name, name.upper(), name.title(), wide, f" {name}", f"{name} ", f"{name}\t"]
    spelled += [unicodedata.normalize(form, wide + "\u0301") for form in forms]
    spelled += [f"{name}\0", f"{name}\u200b", f"\u202e{name[::-1]}", f"{name}\ufeff", f"{name}\r\n"]
    spelled += [f"./{name}", f"../{name}", f"{name}/.", f"{name}/", f"{name};x=1", f"{name}%00"]
    return [*spelled, f"{name}.jsonl", "*", name * 60]


def attempts(own: str, other: str, user: int, item: int, draw: random.Random) -> Iterator[Attempt]:
    """Without end, in a random order. Args: user: one of the other client's."""
    while True:
        kinds = [*_paths(own, other, user), *_bodies(own, other, user, item)]
        draw.shuffle(kinds)
        yield from kinds


def _paths(own: str, other: str, user: int) -> Iterator[Attempt]:
    tails = ("", "/users", f"/users/{user}", "/users?limit=1000", f"/users/{user}?limit=5")
    for name in spell(other):
        for tail in tails:
            yield Attempt("GET", f"/v1/clients/{quote(name, safe='')}{tail}")
    around = [
        f"/v1/clients/{own}/../{other}",
        f"/v1/clients/{own}%2F..%2F{other}",
        f"/v1/clients/{own}%252F..%252F{other}",
        f"/v1/clients/{own}/..%2f{other}/users",
        f"/v1//clients/{other}",
        f"//v1/clients/{other}/users",
        f"/./v1/clients/{other}/users",
        f"/v1/clients/{other}%2Fusers",
        f"/v1/clients/{other}%2Fusers%2F{user}",
        f"/V1/CLIENTS/{other}/users",
        f"/v1/clients/{other}/users/{user}/",
        f"/v1/clients/{other};/users",
        f"/v1/clients/{own}/users/{user}?id={other}",
        f"/v1/clients/{own}/users?client={other}",
        f"/v1/clients?prefix={other}",
        f"/v1/clients?prefix={other}&prefix=",
        f"/v1/clients?after={own[:-1]}",
        f"/v1/quality?client={other}",
        "/v1/live",
        "/metrics",
        "/-/../metrics",
        "http://127.0.0.1/metrics",
    ]
    for target in around:
        yield Attempt("GET", target)
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "POST", "TRACE"):
        for tail in tails[:3]:
            yield Attempt(method, f"/v1/clients/{other}{tail}")
    path = f"/v1/clients/{own}"
    for name in ("X-Original-URL", "X-Rewrite-URL", "X-HTTP-Method-Override", "X-Forwarded-Prefix"):
        yield Attempt("GET", path, headers=((name, f"/v1/clients/{other}/users"),))
    for value in (f"Bearer {other}", "Bearer operator", "Basic b3BlcmF0b3I6"):
        yield Attempt("GET", f"/v1/clients/{other}", headers=(("Authorization", value),))


def _bodies(own: str, other: str, user: int, item: int) -> Iterator[Attempt]:
    for name in spell(other):
        one: dict[str, Any] = {"client": name, "user_id": user}
        yield _post("/v1/recommend", one)
        yield _post("/v1/recommend", {"client": name, "history": [item]})
        mine: dict[str, Any] = {"client": own, "history": [item]}
        for queries in ([one], [mine, one], [one, mine], [mine] * 63 + [one]):
            yield _post("/v1/recommend/batch", {"queries": queries})
        event = {"event_id": "stolen", **one, "item_id": item, "timestamp": 1_700_000_000}
        good = {**event, "client": own, "event_id": "mine"}
        yield _post("/v1/events", {"events": [event]})
        yield _post("/v1/events", {"events": [good, event]})
    yield _post("/v1/recommend", {"client": own, "user_id": user})
    yield _post("/v1/recommend", {"client": own, "user_id": user, "as_of": "test"})
    twice = f'{{"client": "{own}", "user_id": {user}, "client": "{other}"}}'.encode()
    yield Attempt("POST", "/v1/recommend", twice)
    yield Attempt("POST", f"/v1/recommend?client={own}", json.dumps(one).encode())
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        body = f"client={other}&user_id={user}".encode()
        yield Attempt("POST", "/v1/recommend", body, (("Content-Type", kind),))
    yield Attempt("POST", "/v1/recommend", json.dumps(one).encode("utf-16"))
    yield _post("/v1/items", {"items": [{"item_id": 2**40, "title": "mine"}]})


def _post(target: str, body: Any) -> Attempt:
    return Attempt("POST", target, json.dumps(body).encode())


def twins(other: str, user: int, item: int) -> Iterator[tuple[Attempt, Attempt]]:
    """What is there and not one's own, and what is not there."""
    nobody, no_user, no_item = "zz", 10**15, 10**15 + 1
    for tail in ("", "/users", f"/users/{user}", "/users?prefix=1"):
        for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
            there, not_there = f"/v1/clients/{other}{tail}", f"/v1/clients/{nobody}{tail}"
            yield Attempt(method, there), Attempt(method, not_there)
    path = f"/v1/clients/{other}/users"
    yield Attempt("GET", f"{path}/{user}"), Attempt("GET", f"{path}/{no_user}")
    base: dict[str, Any] = {"client": other, "user_id": user}
    for changed in ({"client": nobody}, {"user_id": no_user}):
        yield _post("/v1/recommend", base), _post("/v1/recommend", base | changed)
        pair = [_post("/v1/recommend/batch", {"queries": [base | c]}) for c in ({}, changed)]
        yield pair[0], pair[1]
    event = {"event_id": "x", **base, "item_id": item, "timestamp": 1_700_000_000}
    for changed in ({"client": nobody}, {"user_id": no_user}, {"item_id": no_item}):
        found, missed = ({"events": [event | c]} for c in ({}, changed))
        yield _post("/v1/events", found), _post("/v1/events", missed)
    known, unknown = ({"client": other, "history": [at]} for at in (item, no_item))
    yield _post("/v1/recommend", known), _post("/v1/recommend", unknown)
    lists = (f"/v1/clients?prefix={name}" for name in (other, nobody))
    there, not_there = (Attempt("GET", target) for target in lists)
    yield there, not_there


def leaks(said: Said, own: str, clients: Sequence[str], user: int) -> bool:
    """Whether an answer that is none of the refusals names another client, or its user."""
    if said.status >= 400:
        return False
    text = said.body.decode(errors="replace")
    others = "|".join(re.escape(client) for client in clients if client != own)
    return re.search(rf'"({others})"|"user_id": ?{user}\b', text) is not None


def try_all(
    stranger: Stranger,
    wanted: Iterator[Attempt],
    count: int,
    is_success: Callable[[Said], bool],
) -> tuple[Counter[int], list[tuple[Attempt, Said]]]:
    """Statuses, and the attempts that told something of another client."""
    statuses: Counter[int] = Counter()
    successes = []
    for attempt in itertools.islice(wanted, count):
        said = stranger.send(attempt)
        statuses[said.status] += 1
        if is_success(said):
            successes.append((attempt, said))
    return statuses, successes
