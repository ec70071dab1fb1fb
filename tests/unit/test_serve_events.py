"""`POST /v1/events` over ASGI: what is refused, what is stored, the next request on any replica."""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recommender import train
from test_serve_api import ANYTHING, Asked, open_api, refusal

from fellray.platform.config import RunConfig
from fellray.platform.events import Event, EventLog
from fellray.serve.args import Args
from fellray.serve.events import AHEAD_S
from fellray.serve.refusal import Refusal
from fellray.serve.whole import open_whole

PATH = "/v1/events"


@pytest.fixture(scope="module")
def folder(tiny_config: Callable[..., RunConfig]) -> str:
    return train(tiny_config(train={"rounds": 1})).folder


@pytest.fixture(scope="module")
def replicas(folder: str) -> Iterator[tuple[Asked, Asked]]:
    """Two of one run, which know nothing of each other."""
    args = Args(run=folder, round="latest", body_kib=64, burst=100_000, rate=100_000)
    recommenders = [open_whole(args) for _ in range(2)]
    first, second = (open_api(folder, one, args) for one in recommenders)
    yield first, second
    for one in recommenders:
        one.close()


@pytest.fixture
def asked(replicas: tuple[Asked, Asked], folder: str) -> Iterator[Asked]:
    """The first of them; what is stored goes with the test."""
    yield replicas[0]
    for file in Path(folder, "events").glob("*"):
        file.unlink()
    for one in replicas:
        one.recommender.events._logs.clear()


def event(asked: Asked, number: int = 0, client: str = "c0", **changed: Any) -> dict[str, Any]:
    user = int(asked.data.shard(client).users[0])
    body = {"event_id": f"e{number}", "client": client, "user_id": user}
    return body | {"item_id": int(asked.data.item_ids[number]), "timestamp": 10**9} | changed


def stored(folder: str) -> dict[str, list[str]]:
    return {
        file.stem: [json.loads(line)["event_id"] for line in file.read_text().splitlines()]
        for file in sorted(Path(folder, "events").glob("*"))
        if file.stat().st_size
    }


def test_stored_once_and_told_so(asked: Asked, replicas: tuple[Asked, Asked], folder: str) -> None:
    few = [event(asked, n) for n in range(3)]
    answers = [asked("POST", PATH, {"events": few}, token="c0")]
    answers += [one("POST", PATH, {"events": few[1:]}, token="c0") for one in replicas]
    answers.append(replicas[1]("POST", PATH, {"events": [*few, event(asked, 3), few[0]]}))
    assert answers == [
        (200, {"stored": 3, "known": 0}),
        (200, {"stored": 0, "known": 2}),
        (200, {"stored": 0, "known": 2}),
        (200, {"stored": 1, "known": 4}),
    ]
    assert stored(folder) == {"c0": ["e0", "e1", "e2", "e3"]}


def test_one_request_may_hold_several_clients_events(asked: Asked, folder: str) -> None:
    body = {"events": [event(asked, 0), event(asked, 0, "c1"), event(asked, 1, "c1")]}
    assert asked("POST", PATH, body) == (200, {"stored": 3, "known": 0})
    assert stored(folder) == {"c0": ["e0"], "c1": ["e0", "e1"]}
    answer = asked("POST", PATH, body, token="c1")
    assert refusal(answer) == (403, "not_allowed", "events.0.client")


def test_what_is_refused_leaves_nothing(asked: Asked, folder: str) -> None:
    good = event(asked, 0)
    other = int(asked.data.shard("c1").users[0])
    soon = int(time.time()) + AHEAD_S
    for changed, expected in [
        ({"client": "c9"}, (404, "unknown_client", "events.1.client")),
        ({"item_id": 10**6}, (404, "unknown_item", "events.1.item_id")),
        ({"user_id": other}, (404, "unknown_user", "events.1.user_id")),
        ({"user_id": -1}, (404, "unknown_user", "events.1.user_id")),
        ({"timestamp": soon + 60}, (422, "bad_timestamp", "events.1.timestamp")),
        ({"timestamp": 10**9 * 1000}, (422, "bad_timestamp", "events.1.timestamp")),
        ({"timestamp": -1}, (422, "invalid", "events.1.timestamp")),
        ({"timestamp": 1.5}, (422, "invalid", "events.1.timestamp")),
        ({"timestamp": "2026-01-01"}, (422, "invalid", "events.1.timestamp")),
        ({"timestamp": True}, (422, "invalid", "events.1.timestamp")),
        ({"event_id": ""}, (422, "invalid", "events.1.event_id")),
        ({"event_id": "x" * 201}, (422, "invalid", "events.1.event_id")),
        ({"event_id": 3}, (422, "invalid", "events.1.event_id")),
        ({"event_id": "\ud800"}, (422, "invalid", "events.1.event_id")),
        ({"item_id": 2**63}, (422, "invalid", "events.1.item_id")),
        ({"rating": 5}, (422, "invalid", "events.1.rating")),
        ({"event_id": "e0", "timestamp": 5}, (409, "other_event", "events.1.event_id")),
    ]:
        body = {"events": [good, event(asked, 1) | changed]}
        assert refusal(asked("POST", PATH, body)) == expected, changed
    assert refusal(asked("POST", PATH, {"events": []})) == (422, "invalid", "events")
    many = {"events": [good] * 501}
    assert refusal(asked("POST", PATH, many))[0] in (413, 422)
    assert refusal(asked("POST", PATH, {"events": [good]}, token=None))[0] == 401
    assert refusal(asked("POST", PATH, {"events": [good]}, token="c1"))[0] == 403
    assert stored(folder) == {}
    assert asked("POST", PATH, {"events": [good | {"timestamp": soon - 60}]})[0] == 200


def test_an_id_that_is_taken_is_told_on_every_replica(
    asked: Asked, replicas: tuple[Asked, Asked]
) -> None:
    assert asked("POST", PATH, {"events": [event(asked, 0)]})[0] == 200
    for one in replicas:
        body = {"events": [event(asked, 1), event(asked, 0, item_id=int(asked.data.item_ids[7]))]}
        status, answer = one("POST", PATH, body, token="c0")
        assert refusal((status, answer)) == (409, "other_event", "events.1.event_id")


def test_the_next_request_knows_it_on_every_replica(
    asked: Asked, replicas: tuple[Asked, Asked]
) -> None:
    """At once: the history is the prepared one and the events, by their time; they are seen."""
    shard = asked.data.shard("c0")
    user = int(shard.users[0])
    met = asked.data.item_ids[shard.items[: shard.offsets[1]]].tolist()
    before = replicas[1].recommend(client="c0", user_id=user, k=50)
    test = replicas[1].recommend(client="c0", user_id=user, k=50, as_of="test")
    new = [i["item_id"] for i in before["items"][:3]]
    events = [
        event(asked, n, item_id=item, timestamp=10**9 - n) for n, item in enumerate(new, start=1)
    ]
    for one, few in zip(replicas, (events[:2], events[2:]), strict=True):
        assert one("POST", PATH, {"events": few}, token="c0")[0] == 200
    by_hand = asked.recommend(client="c0", history=met + new[::-1], k=50)
    for one in replicas:
        now = one.recommend(client="c0", user_id=user, k=50)
        assert now["items"] == by_hand["items"]
        assert not {i["item_id"] for i in now["items"]} & set(met + new)
        assert one.recommend(client="c0", user_id=user, k=50, as_of="test") == test
    assert by_hand["items"] != before["items"]
    other = int(shard.users[1])
    last = asked.data.item_ids[shard.items[shard.offsets[1] : shard.offsets[2]]].tolist()
    alone = asked.recommend(client="c0", history=last, k=50)
    assert asked.recommend(client="c0", user_id=other, k=50)["items"] == alone["items"]


def test_a_file_that_is_damaged_is_its_clients_own(asked: Asked, folder: str) -> None:
    for client in ("c0", "c1"):
        body = {"events": [event(asked, 0, client)]}
        assert asked("POST", PATH, body)[0] == 200
    with open(f"{folder}/events/c0.jsonl", "ab") as file:
        file.write(b"what is this\n")
    user = {client: int(asked.data.shard(client).users[0]) for client in ("c0", "c1")}
    query = {"client": "c0", "user_id": user["c0"]}
    broken = (503, "events_unavailable", None)
    assert asked.refused(**query) == broken
    assert refusal(asked("POST", PATH, {"events": [event(asked, 1)]})) == broken
    assert asked.recommend(**query, as_of="test")["items"]
    assert asked.recommend(client="c1", user_id=user["c1"])["items"]
    assert asked("POST", PATH, {"events": [event(asked, 1, "c1")]})[0] == 200


def test_a_folder_of_its_own_and_none_at_all(folder: str, tmp_path: Path) -> None:
    args = Args(run=folder, round="latest", events=str(tmp_path / "there"), shards=1)
    recommender = open_whole(args)
    asked = open_api(folder, recommender, args)
    for client in ("c0", "c1", "c0"):
        assert asked("POST", PATH, {"events": [event(asked, 0, client)]})[0] == 200
    assert sorted(os.listdir(tmp_path / "there")) == ["c0.jsonl", "c1.jsonl"]
    recommender.events._folder = None
    status = refusal(asked("POST", PATH, {"events": [event(asked, 1)]}))
    assert status == (503, "no_events", None)
    user = int(asked.data.shard("c0").users[0])
    assert asked.recommend(client="c0", user_id=user)["items"]
    recommender.close()


NEARLY = st.fixed_dictionaries(
    {
        "event_id": st.sampled_from(["a", "b", "\u2028", "\ud800", ""]),
        "client": st.sampled_from(["c0", "c1", "zz"]),
        "user_id": st.integers(-1, 45) | ANYTHING,
        "item_id": st.integers(-1, 55) | ANYTHING,
        "timestamp": st.integers(0, 10) | ANYTHING,
    },
    optional={"x": ANYTHING},
)


@settings(max_examples=200)
@given(body=st.fixed_dictionaries({"events": st.lists(NEARLY, max_size=3)}) | ANYTHING)
def test_whatever_is_sent_is_answered(replicas: tuple[Asked, Asked], body: Any) -> None:
    status, answer = replicas[0]("POST", PATH, json.dumps(body).encode())
    assert status in (200, 404, 409, 422), answer
    assert set(answer) <= {"stored", "known", "error"}


def test_the_document_has_it(asked: Asked) -> None:
    _, document = asked("GET", "/openapi.json", token=None)
    post = document["paths"][PATH]["post"]
    assert set(post["responses"]) >= {"200", "401", "403", "404", "409", "413", "422", "429", "503"}
    new = document["components"]["schemas"]["NewEvent"]
    assert new["additionalProperties"] is False
    assert set(new["required"]) == {"event_id", "client", "user_id", "item_id", "timestamp"}
    assert np.all([new["properties"][name] for name in new["required"]])


def test_an_item_that_came_later_can_be_met(folder: str, tmp_path: Path) -> None:
    """At once, on a replica that has not yet heard of the item; and it counts for the next one."""
    run = shutil.copytree(folder, tmp_path / "tiny")
    args = Args(run=str(run), round="latest", poll_s=1000, shards=1)
    recommenders = [open_whole(args) for _ in range(3)]
    first, second, third = (open_api(str(run), one, args) for one in recommenders)
    item = {"item_id": -7, "title": "word01 word02"}
    strange = {"events": [event(first, 0, item_id=-7)]}
    expected = (404, "unknown_item", "events.0.item_id")
    assert refusal(first("POST", PATH, strange)) == expected
    assert first("POST", "/v1/items", {"items": [item]})[0] == 200
    shard = first.data.shard("c0")
    user, rows = int(shard.users[0]), slice(*shard.offsets[:2].tolist())
    met = first.data.item_ids[shard.items[rows]].tolist()
    before = first.recommend(client="c0", user_id=user, k=60)["items"]
    assert second("POST", PATH, strange, token="c0") == (200, {"stored": 1, "known": 0})
    by_hand = first.recommend(client="c0", history=[*met, -7], k=60)["items"]
    for one in (first, second, third):
        now = one.recommend(client="c0", user_id=user, k=60)["items"]
        assert now == by_hand
        assert -7 in {place["item_id"] for place in before} - {place["item_id"] for place in now}
        past = one("GET", f"/v1/clients/c0/users/{user}?limit=1")[1]
        assert past["items"] == [item]
        users = one("GET", "/v1/clients/c0/users", token="c0")[1]["users"]
        counted = {row["user_id"]: row["interactions"] for row in users}
        assert counted[user] == past["interactions"] == len(met) + 1
    for one in recommenders:
        one.close()


def test_nobody_waits_longer_than_once(folder: str, tmp_path: Path) -> None:
    """Of two requests that wait together for another writer, and of one that was given up."""
    args = Args(run=folder, round="latest", events=str(tmp_path), timeout_s=0.6)
    recommender = open_whole(args)
    asked = open_api(folder, recommender, args)

    async def send(*events: dict[str, Any]) -> list[tuple[int, Any]]:
        sent = (asked.send("POST", PATH, {"events": [one]}) for one in events)
        return await asyncio.gather(*sent)

    c0 = [event(asked, n) for n in range(3)]
    with EventLog(str(tmp_path / "c0.jsonl")).writing(1):
        began = time.monotonic()
        answers = asyncio.run(send(*c0, event(asked, 0, "c1")))
        took = time.monotonic() - began
        waiting = [[("c0", Event(f"e{n}", 1, 1, 1))] for n in range(3)]
        began = time.monotonic()
        left = recommender.events._store(waiting)
        took_together = time.monotonic() - began
    assert [type(one) for one in left] == [Refusal] * 3
    assert took_together < 1.2
    told = {refusal(answer)[:2] for answer in answers if answer[0] != 200}
    assert told <= {(503, "overloaded"), (503, "events_unavailable")}
    assert took < 5
    assert len([answer for answer in answers if answer[0] != 200]) >= 3
    # whatever became of them: each is there once in the end
    status, receipt = asked("POST", PATH, {"events": [*c0, event(asked, 0, "c1")]})
    assert (status, receipt["stored"] + receipt["known"]) == (200, 4)
    recommender.close()
    lines = (tmp_path / "c0.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["event_id"] for line in lines) == ["e0", "e1", "e2"]
