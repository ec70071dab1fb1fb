"""The API over ASGI, without Ray: the evaluation's own rankings, filters, cold start, refusals."""

import asyncio
import gzip
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recommender import train

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.messages import Activation
from fellray.platform.metrics import Evaluator
from fellray.platform.promotion import promote, roll_back
from fellray.platform.rounds import Rounds
from fellray.platform.run import read_run
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve.api import make_api
from fellray.serve.args import Args
from fellray.serve.recommender import Recommender
from fellray.serve.tokens import new_token, read_tokens
from fellray.serve.trunk import Trunk
from fellray.serve.whole import open_whole

LAST = 2


@dataclass
class Asked:
    """The API of one run, and how to ask it."""

    app: Any
    recommender: Recommender
    tokens: dict[str, str]
    data: Dataset
    folder: str
    heads: list[dict[str, str]] = field(default_factory=list)

    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        token: str | None = "operator",
        parts: int = 1,
        declared: bool = True,
        headers: Sequence[tuple[bytes, bytes]] = ((b"content-type", b"application/json"),),
    ) -> tuple[int, Any]:
        """Status and body. Args: parts: pieces in which the body comes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
        headers = list(headers)
        if declared:
            headers.append((b"content-length", b"%d" % len(data)))
        if token is not None:
            value = f"Bearer {self.tokens.get(token, token)}"
            headers.append((b"authorization", value.encode("latin-1")))
        size = -(-len(data) // parts) or 1
        pieces = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not pieces:
                return {"type": "http.disconnect"}
            part = pieces.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(pieces)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": quote(path).encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": headers,
            "scheme": "http",
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
        }
        await self.app(scope, receive, send)
        heads = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
        self.heads.append(heads)
        text = b"".join(m.get("body", b"") for m in sent[1:])
        is_json = heads["content-type"] == "application/json"
        return sent[0]["status"], json.loads(text) if is_json else text.decode()

    def __call__(self, *args: Any, **settings: Any) -> tuple[int, Any]:
        """As `send`, at once."""
        return asyncio.run(self.send(*args, **settings))

    def recommend(self, **query: Any) -> dict[str, Any]:
        """The answer to a query that is one."""
        status, answer = self("POST", "/v1/recommend", query)
        assert status == 200, answer
        found: dict[str, Any] = answer
        return found

    def refused(self, **query: Any) -> tuple[int, str, str | None]:
        """Status, code and field of a query that is none."""
        return refusal(self("POST", "/v1/recommend", query))


def refusal(answer: tuple[int, Any]) -> tuple[int, str, str | None]:
    status, body = answer
    assert set(body) == {"error"}
    return status, body["error"]["code"], body["error"]["field"]


def open_api(folder: str, recommender: Recommender, args: Args) -> Asked:
    storage = Storage(folder)
    tokens = {name: new_token(storage, name) for name in ("c0", "c1", "nobody")}
    tokens["operator"] = new_token(storage, None)
    app = make_api(recommender, args, lambda: read_tokens(storage), {"replica": "r"})
    data = Dataset(read_run(folder).config.data.path)
    return Asked(app, recommender, tokens, data, folder)


@pytest.fixture(scope="module")
def config(tiny_config: Callable[..., RunConfig]) -> RunConfig:
    # one crew: clients are evaluated in their order
    return tiny_config(clients={"per_actor": 5, "crews": 1}, keep_last=LAST + 1)


@pytest.fixture(scope="module")
def asked(config: RunConfig) -> Iterator[Asked]:
    folder = train(config).folder
    args = Args(run=folder, round="latest", body_kib=64, adapters=3, rows=8, burst=10_000)
    recommender = open_whole(args)
    yield open_api(folder, recommender, args)
    recommender.close()


def test_over_the_api_it_is_the_evaluation(
    config: RunConfig, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of every test user of every client as `Evaluator` gets them, ranked by sorting."""
    rows: list[torch.Tensor] = []
    masks: list[np.ndarray] = []

    def listen(
        self: Evaluator, scores: torch.Tensor, seen: Sequence[np.ndarray], truth: object
    ) -> None:
        rows.extend(scores)
        masks.extend(seen)

    monkeypatch.setattr(Evaluator, "add", listen)
    monkeypatch.setattr(Evaluator, "score", lambda self: None)
    rounds = Rounds(Storage(asked.folder))
    with Plant.inline(config, survey(config), rounds) as plant:
        plant.evaluate(LAST, 2)
    users = [
        (client, user)
        for client in asked.data.clients
        for user in asked.data.shard(client).held_out(2).users.tolist()
    ]
    assert len(users) == len(rows) == 40
    k = len(asked.data.titles)
    queries = [{"client": c, "user_id": u, "as_of": "test", "k": k} for c, u in users]
    status, batch = asked("POST", "/v1/recommend/batch", {"queries": queries})
    assert status == 200, batch
    for scores, seen, answer in zip(rows, masks, batch["answers"], strict=True):
        left = np.setdiff1d(np.arange(k), seen)
        order = left[np.argsort(-scores.numpy()[left], kind="stable")]
        items = answer["items"]
        assert [i["item_id"] for i in items] == asked.data.item_ids[order].tolist()
        assert [i["rank"] for i in items] == list(range(1, len(items) + 1))
        np.testing.assert_allclose([i["score"] for i in items], scores.numpy()[order], atol=1e-5)
        assert (answer["layer"], answer["round"]) == ("client", LAST)


def test_what_a_user_met_now_and_before(asked: Asked) -> None:
    shard = asked.data.shard("c0")
    user = int(shard.users[0])
    met = asked.data.item_ids[shard.items[: shard.offsets[1]]].tolist()
    now = asked.recommend(client="c0", user_id=user, k=50)
    assert not {i["item_id"] for i in now["items"]} & set(met)
    assert now["items"] == asked.recommend(client="c0", history=met, k=50)["items"]
    before = asked.recommend(client="c0", user_id=user, as_of="test", k=50)
    assert {i["item_id"] for i in before["items"]} & set(met) == {met[-1]}
    kept = asked.recommend(client="c0", user_id=user, k=50, filters={"seen": False})
    assert len(kept["items"]) == 50


def test_filters_choose_and_do_not_change_scores(asked: Asked) -> None:
    query: dict[str, Any] = {"client": "c1", "history": ["word01", "word02 word03"], "k": 50}
    whole = asked.recommend(**query)["items"]
    scores = {i["item_id"]: i["score"] for i in whole}
    ids = [i["item_id"] for i in whole]

    def left(**more: Any) -> list[int]:
        items = asked.recommend(**query, **more)["items"]
        assert {i["item_id"]: i["score"] for i in items}.items() <= scores.items()
        return [i["item_id"] for i in items]

    few = ids[5:12]
    assert left(candidates=few[::-1]) == few
    assert left(filters={"allow": few}) == few
    assert left(filters={"deny": few}) == ids[:5] + ids[12:]
    assert left(candidates=few, filters={"allow": ids[:8], "deny": ids[5:6]}) == ids[6:8]
    assert left(candidates=few, filters={"deny": few}) == []
    known = asked.recommend(**{**query, "history": [ids[0]]})["items"]
    assert ids[0] not in [i["item_id"] for i in known]


def test_cold_clients_are_answered_from_the_lower_rungs(
    tiny_config: Callable[..., RunConfig],
) -> None:
    """One of five clients trains in the round; the other four, and strangers, have no adapters."""
    config = tiny_config(train={"rounds": 1}, sampling={"per_round": 2}, clients={"per_actor": 5})
    folder = train(config).folder
    args = Args(run=folder, round=1)
    recommender = open_whole(args)
    asked = open_api(folder, recommender, args)
    trained = sorted(recommender.served.trained)
    assert len(trained) == 2
    layers = {c: asked.recommend(client=c, history=["word01"])["layer"] for c in asked.data.clients}
    assert {c for c, layer in layers.items() if layer == "client"} == set(trained)
    assert {layer for c, layer in layers.items() if c not in trained} == {"neighbours"}
    (cold, *_) = (c for c in asked.data.clients if c not in trained)
    assert asked("GET", f"/v1/clients/{cold}")[1]["layer"] == "neighbours"
    assert asked("GET", f"/v1/clients/{trained[0]}")[1]["layer"] == "client"

    item = int(asked.data.item_ids[asked.data.shard(trained[0]).items[0]])
    assert asked.recommend(client="new shop", history=[item])["layer"] == "neighbours"
    assert asked.recommend(client="new shop", history=["word59 word58"])["layer"] == "mean"
    empty = asked.recommend(client="new shop", history=[], k=50)
    assert empty["layer"] == "popularity"
    order = np.argsort(-asked.data.popularity, kind="stable")
    assert [i["item_id"] for i in empty["items"]] == asked.data.item_ids[order].tolist()
    own = asked.recommend(client=cold, history=[], k=50)
    counts = asked.data.shard(cold).counts(50)
    order = np.argsort(-counts, kind="stable")
    assert [i["item_id"] for i in own["items"]] == asked.data.item_ids[order].tolist()
    recommender.close()


def test_a_mean_of_one_is_that_one(tiny_config: Callable[..., RunConfig]) -> None:
    """A blend crosses the cut on both sides: alone, its member's own numbers."""
    config = tiny_config(train={"rounds": 1}, sampling={"per_round": 1}, clients={"per_actor": 5})
    folder = train(config).folder
    args = Args(run=folder, round=1)
    recommender = open_whole(args)
    asked = open_api(folder, recommender, args)
    (trained,) = recommender.served.trained
    cold = next(c for c in asked.data.clients if c != trained)
    scores = []
    for client in (trained, cold):
        answer = asked.recommend(client=client, history=["word01 word02"], k=50)
        prior = np.log1p(asked.data.shard(client).counts(50)).astype(np.float32)
        of = dict(zip(asked.data.item_ids.tolist(), prior.tolist(), strict=True))
        scores.append({i["item_id"]: i["score"] - of[i["item_id"]] for i in answer["items"]})
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    recommender.close()


class Slow:
    """A trunk that waits to be let on."""

    def __init__(self, trunk: Trunk):
        self.trunk = trunk
        self.arrived = asyncio.Event()
        self.go = asyncio.Event()
        self.rounds: list[int] = []

    async def forward(self, activation: Activation) -> np.ndarray:
        self.rounds.append(activation.round)
        self.arrived.set()
        await self.go.wait()
        return await self.trunk.forward(activation)

    async def ready(self) -> bool:
        return True


def test_no_answer_mixes_rounds(asked: Asked) -> None:
    """Taken over between the two halves of a query: it ends as it began, the next one is new."""
    query = {"client": "c0", "history": ["word01"]}
    args = Args(run=asked.folder, round="latest", adapters=1)
    storage = read_run(asked.folder).storage
    expected = {}
    for round in (0, LAST):
        whole = open_whole(Args(run=asked.folder, round=round))
        other = open_api(asked.folder, whole, args)
        expected[round] = other.recommend(**query)
        whole.close()
    learners = asked.recommender.seats

    async def play() -> list[tuple[int, Any]]:
        slow = Slow(Trunk(args, learners))
        recommender = Recommender(args, slow)
        api = open_api(asked.folder, recommender, args)
        first = asyncio.create_task(api.send("POST", "/v1/recommend", query))
        await slow.arrived.wait()
        promote(storage, 0, lambda: [0, 1, 2])
        recommender._watch.look()
        assert recommender.served.round == 0
        second = asyncio.create_task(api.send("POST", "/v1/recommend", query))
        while len(slow.rounds) < 2:
            await asyncio.sleep(0.01)
        slow.go.set()
        answers = [await first, await second]
        roll_back(storage)
        recommender._watch.look()
        answers.append(await api.send("POST", "/v1/recommend", query))
        recommender.close()
        slow.trunk.close()
        assert slow.rounds == [LAST, 0, LAST]
        return answers

    assert asyncio.run(play()) == [(200, expected[round]) for round in (LAST, 0, LAST)]


def test_a_client_sees_itself_only(asked: Asked) -> None:
    query = {"client": "c1", "history": ["word01"]}
    own = {**query, "client": "c0"}
    path = "/v1/recommend"
    assert asked("POST", path, own, token="c0")[0] == 200
    assert refusal(asked("POST", path, query, token="c0")) == (403, "not_allowed", "client")
    batch = {"queries": [own, query]}
    assert refusal(asked("POST", f"{path}/batch", batch, token="c0"))[2] == "queries.1.client"
    assert refusal(asked("GET", "/v1/clients/c1", token="c0")) == (403, "not_allowed", "id")
    assert refusal(asked("GET", "/v1/clients/zz", token="c0")) == (403, "not_allowed", "id")
    stranger = {**query, "client": "nobody"}
    assert refusal(asked("POST", path, stranger, token="nobody")) == (
        404,
        "unknown_client",
        "client",
    )
    assert asked("POST", path, stranger, token="operator")[1]["layer"] == "mean"


def test_whoever_has_no_token_learns_nothing(asked: Asked) -> None:
    for path in ("/v1/recommend", "/v1/items/0", "/v1/clients/c0", "/v1/runs", "/metrics", "/x"):
        for method in ("GET", "POST", "DELETE"):
            assert refusal(asked(method, path, b"{", token=None)) == (401, "no_token", None)
            assert asked.heads[-1]["www-authenticate"] == "Bearer"
            assert refusal(asked(method, path, b"{", token="x")) == (401, "wrong_token", None)
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert asked("GET", path, token=None)[0] == 200


def test_bodies_that_are_none(asked: Asked) -> None:
    good: dict[str, Any] = {"client": "c0", "history": ["word01"]}
    for changed, place in [
        ({"k": 0}, "k"),
        ({"k": 1001}, "k"),
        ({"k": True}, "k"),
        ({"k": 2.5}, "k"),
        ({"k": "2"}, "k"),
        ({"K": 2}, "K"),
        ({"client": ""}, "client"),
        ({"client": 3}, "client"),
        ({"history": "word01"}, "history"),
        ({"history": ["  "]}, "history.0"),
        ({"history": ["\x85 \ufeff\x1c\u3000"]}, "history.0"),
        ({"history": [1, None]}, "history.1"),
        ({"history": [1] * 1001}, "history"),
        ({"history": [2**63]}, "history.0"),
        ({"history": [0.5]}, "history.0"),
        ({"history": [2.0**54]}, "history.0"),
        ({"history": ["\ud800"]}, "history.0"),
        ({"user_id": 1}, "history"),
        ({"filters": {"sen": True}}, "filters.sen"),
        ({"filters": {"seen": 1}}, "filters.seen"),
        ({"candidates": []}, "candidates"),
        ({"as_of": "test"}, "as_of"),
    ]:
        assert asked.refused(**{**good, **changed}) == (422, "invalid", place), changed
    assert refusal(asked("POST", "/v1/recommend", b'{"client": "c0", "k": NaN}'))[0] == 422
    assert asked.refused(client="c0") == (422, "invalid", "history")
    assert asked.refused(client="c0", user_id=0, as_of="later") == (422, "invalid", "as_of")
    for body in (b"{", b"", b"\xff", b"[" * 60_000, b'"' * 3):
        status, code, _ = refusal(asked("POST", "/v1/recommend", body))
        assert (status, code in ("no_json", "invalid")) == (422, True), body[:9]
    assert asked.recommend(**good, k=2.0) == asked.recommend(**good, k=2)  # the same number in JSON
    odd = ["\x00", "\u202e\u0301", "𝕿" * 500, "a\tb\n", "word01;;;"]
    assert len(asked.recommend(client="c0", history=odd)["items"]) == 10


def test_a_body_that_is_no_json_by_its_own_words(asked: Asked) -> None:
    good = b'{"client": "c0", "history": ["word01"]}'
    for kind, packed, status in [
        ("application/json", "identity", 200),
        ("Application/JSON; charset=utf-8", "identity", 200),
        ("text/plain", "identity", 415),
        ("application/xml", "identity", 415),
        ("application/x-www-form-urlencoded", "identity", 415),
        ("", "identity", 415),
        ("application/json", "gzip", 415),
    ]:
        headers = [(b"content-type", kind.encode()), (b"content-encoding", packed.encode())]
        body = good if packed == "identity" else gzip.compress(good)
        assert asked("POST", "/v1/recommend", body, headers=headers)[0] == status, (kind, packed)
    assert asked.heads[-1]["accept"] == "application/json"
    assert asked("POST", "/v1/recommend", b"\x1f\x8b")[0] == 422


def test_bodies_that_are_too_large_are_not_read(asked: Asked) -> None:
    large = b'{"client": ' + b" " * 70_000
    expected = (413, "body_too_large", None)
    assert refusal(asked("POST", "/v1/recommend", large)) == expected
    assert refusal(asked("POST", "/v1/recommend", large, parts=9, declared=False)) == expected
    whole = json.dumps({"client": "c0", "history": ["word01"]}).encode()
    assert asked("POST", "/v1/recommend", whole, parts=5, declared=False)[0] == 200


def test_so_many_requests_a_second(asked: Asked) -> None:
    args = Args(run=asked.folder, round="latest", rate=0.01, burst=2)
    few = open_api(asked.folder, asked.recommender, args)
    assert [few("GET", "/v1/runs", token="c0")[0] for _ in range(3)] == [200, 200, 429]
    assert few.heads[-1]["retry-after"] == "100"
    assert few("GET", "/v1/runs", token="c1")[0] == 200


def test_so_many_queries_a_second(asked: Asked) -> None:
    args = Args(run=asked.folder, round="latest", rate=0.5, burst=5)
    few = open_api(asked.folder, asked.recommender, args)
    batch = {"queries": [{"client": "c0", "history": ["word01"]}] * 3}
    path = "/v1/recommend/batch"
    assert few("POST", path, batch, token="c0")[0] == 200
    assert refusal(few("POST", path, batch, token="c0")) == (429, "too_many_requests", None)
    assert few.heads[-1]["retry-after"] == "2"
    assert [few("GET", "/v1/runs", token="c0")[0] for _ in range(3)] == [200, 200, 429]


def test_nothing_is_said_twice(asked: Asked) -> None:
    for body in (
        b'{"client": "c0", "history": [], "client": "c1"}',
        b'{"client": "c0", "history": [], "filters": {"seen": true, "seen": false}}',
    ):
        answer = asked("POST", "/v1/recommend", body)
        assert refusal(answer) == (422, "invalid", None)
        assert answer[1]["error"]["message"] == "an object of the body has a key twice"
    assert refusal(asked("POST", "/v1/recommend", b"{")) == (422, "no_json", None)


def test_what_is_counted_and_logged(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fellray")
    asked.recommend(client="c0", history=["canary4711"])
    asked.refused(client="c0", history=["canary4711"], canary4712=1)
    asked("GET", "/canary4713")
    lines = [json.loads(r.message) for r in caplog.records if r.name == "fellray.access"]
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/v1/recommend", 200),
        ("/v1/recommend", 422),
        ("other", 404),
    ]
    assert "canary" not in caplog.text
    assert not any(token in caplog.text for token in asked.tokens.values())
    status, text = asked("GET", "/metrics")
    assert status == 200
    assert 'requests_total{method="GET",route="other",status="404",replica="r"}' in text
    assert f'fellray_serve_round{{replica="r"}} {LAST}' in text
    assert refusal(asked("GET", "/metrics", token="c0")) == (403, "not_allowed", None)


def test_what_is_gone_is_answered_from_what_is_there(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that its run deletes while it is served: the query begins again with the next."""
    ends = asked.recommender._ferry._ends
    rise = ends.rise
    failed = []

    def fail_once(questions: Any) -> Any:
        if failed:
            return rise(questions)
        failed.append(1)
        return [FellrayError("a page is gone")] * len(questions)

    monkeypatch.setattr(ends, "rise", fail_once)
    assert asked.recommend(client="c0", history=["word01"])["round"] == LAST
    monkeypatch.setattr(ends, "rise", lambda q: [FellrayError("gone")] * len(q))
    status, answer = asked("POST", "/v1/recommend", {"client": "c0", "history": ["word01"]})
    assert (status, answer["error"]["code"]) == (503, "unavailable")
    assert answer["error"]["message"] == f"no answer from round {LAST}: the log has why"


def test_a_damaged_shard_is_its_own_clients_trouble(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = asked.recommender._lookup.read

    async def fail(client: str) -> Any:
        if client == "c3":
            raise FellrayError("clients/c3.parquet: is missing")
        return await read(client)

    monkeypatch.setattr(asked.recommender._lookup, "read", fail)
    good, bad = ({"client": client, "history": ["word01"]} for client in ("c0", "c3"))
    assert asked.recommend(**good)["items"]
    status, answer = asked("POST", "/v1/recommend/batch", {"queries": [good, bad]})
    assert refusal((status, answer)) == (503, "unavailable", "queries.1")
    assert answer["error"]["message"] == "data cannot be read: the log has why"


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["c0", "word01", "test", "\ud800", "\x00", 2**63, -(2**70)]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["client", "user_id", "history", "k", "filters", "seen", "queries", "as_of", "x"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
NEARLY = st.fixed_dictionaries(
    {"client": st.sampled_from(["c0", "c4", "zz", ""])},
    optional={
        "history": st.lists(st.integers(-2, 60) | st.text(max_size=30) | ANYTHING, max_size=12),
        "user_id": st.integers(-5, 50) | ANYTHING,
        "k": st.integers(-1, 60) | ANYTHING,
        "filters": st.fixed_dictionaries(
            {},
            optional={
                "seen": st.booleans() | ANYTHING,
                "deny": st.lists(st.integers(0, 55), max_size=9) | ANYTHING,
                "categories": ANYTHING,
            },
        ),
        "candidates": st.lists(st.integers(0, 55), max_size=9) | ANYTHING,
        "as_of": st.sampled_from(["now", "test", "valid", "then"]),
    },
)


@settings(max_examples=300)
@given(
    path=st.sampled_from(["/v1/recommend", "/v1/recommend/batch", "/v1/recommend/"]),
    body=NEARLY | st.fixed_dictionaries({"queries": st.lists(NEARLY, max_size=3)}) | ANYTHING,
    raw=st.none() | st.binary(max_size=40),
    token=st.sampled_from(["operator", "c0", "zz", "\x7f", ""]),
)
def test_whatever_is_sent_is_answered(
    asked: Asked, path: str, body: Any, raw: bytes | None, token: str
) -> None:
    status, answer = asked("POST", path, raw or json.dumps(body).encode(), token=token)
    assert status in (200, 401, 403, 404, 422, 429), answer
    assert set(answer) <= {"run", "round", "client", "layer", "items", "answers", "error"}


@settings(max_examples=100)
@given(path=st.text(max_size=30), token=st.sampled_from(["operator", "c0"]))
def test_whatever_path_is_asked_is_answered(asked: Asked, path: str, token: str) -> None:
    for prefix in ("/", "/v1/items/", "/v1/clients/"):
        quoted = quote(path, safe="/", errors="replace")
        status, answer = asked("GET", prefix + unquote(quoted, errors="replace"), token=token)
        assert status in (200, 403, 404, 405, 422, 429), answer


def test_the_document_says_what_is_served(asked: Asked) -> None:
    status, document = asked("GET", "/openapi.json", token=None)
    assert status == 200
    assert {
        path: sorted(set(methods) & {"get", "post"}) for path, methods in document["paths"].items()
    } == {
        "/v1/recommend": ["post"],
        "/v1/recommend/batch": ["post"],
        "/v1/events": ["post"],
        "/v1/items": ["get", "post"],
        "/v1/items/{id}": ["get"],
        "/v1/clients": ["get"],
        "/v1/clients/{id}": ["get"],
        "/v1/clients/{id}/users": ["get"],
        "/v1/clients/{id}/users/{user_id}": ["get"],
        "/v1/quality": ["get"],
        "/v1/live": ["get"],
        "/v1/runs": ["get"],
        "/healthz": ["get"],
        "/readyz": ["get"],
        "/metrics": ["get"],
    }
    schemas = document["components"]["schemas"]
    assert schemas["ByUser"]["additionalProperties"] is False
    assert refusal(asked("PUT", "/v1/recommend")) == (405, "wrong_method", None)
    assert asked.heads[-1]["allow"] == "POST"
    assert refusal(asked("DELETE", "/v1/items")) == (405, "wrong_method", None)
    assert asked.heads[-1]["allow"] == "GET, POST"
    for path in ("/v1/clients", "/v1/clients/{id}/users", "/v1/clients/{id}", "/v1/quality"):
        assert "503" in document["paths"][path]["get"]["responses"], path
    metrics = document["paths"]["/metrics"]["get"]["responses"]
    assert {status: list(one["content"]) for status, one in metrics.items()} == {
        "200": ["text/plain"],
        **{status: ["application/json"] for status in ("401", "403", "413", "429")},
    }
    # a reader that knows 64 bits can write both ends
    assert schemas["NewItem"]["properties"]["item_id"]["maximum"] == 2**63 - 1
