"""What is recommended is what was evaluated, for the client that asked, and mistakes are named."""

import asyncio
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.prepare import prepare
from fellray.platform.aggregation import reduce
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.metrics import Score
from fellray.platform.outcome import Outcome, pool
from fellray.platform.promotion import promote
from fellray.platform.run import open_run, read_run
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve import recommender as near
from fellray.serve import trunk as far
from fellray.serve.args import Args
from fellray.serve.recommender import Recommender
from fellray.serve.refusal import Refusal
from fellray.serve.schema import Answer, ByHistory, ByUser, Filters, Place
from fellray.serve.served import refuse_passing, verify
from fellray.serve.tokens import new_token
from fellray.serve.whole import open_whole

K = 10
LAST = 2
"""The last round of `tiny_config`."""


@dataclass(frozen=True)
class Trained:
    folder: str
    best: int
    test: dict[str, Score]
    """Each client's at the last round, whatever the best one is: there the adapters have moved."""


def train(config: RunConfig) -> Trained:
    """A run made in this process."""
    world = survey(config)
    with open_run(config, world.data_sha256) as run, Plant.inline(config, world, run.rounds) as p:
        for t in run.to_go():
            if t == 0:
                outcome = Outcome(p.stage_start(), p.validate(0))
            else:
                reports = p.fit(t, p.sample(t))
                plan = config.method.plan(reports.meta)
                mixed = reduce(plan, reports.theta_CP, reports.blocks)
                staged = p.install(reports, plan, mixed)
                outcome = Outcome(staged, p.validate(t), reports, plan)
            run.commit(t, outcome, p.close_ledger(), p.take_events())
        test = p.evaluate(config.train.rounds, 2)
        return Trained(f"{config.storage}/{config.name}", run.best_round(), test)


@pytest.fixture(scope="module")
def trained(tiny_config: Callable[..., RunConfig]) -> Trained:
    return train(tiny_config(clients={"per_actor": 5}, keep_last=LAST + 1))


@contextmanager
def opened(folder: str, **settings: object) -> Iterator[Recommender]:
    recommender = open_whole(Args.model_validate({"run": folder, **settings}))
    try:
        yield recommender
    finally:
        recommender.close()


@pytest.fixture(scope="module")
def recommender(trained: Trained) -> Iterator[Recommender]:
    with opened(trained.folder, round=LAST) as recommender:
        yield recommender


@pytest.fixture
def run_copy(trained: Trained, tmp_path: Path) -> Path:
    shutil.copytree(trained.folder, tmp_path / "tiny")
    return tmp_path / "tiny"


def ask(recommender: Recommender, *queries: ByUser | ByHistory) -> list[Answer]:
    return asyncio.run(recommender.recommend(queries))


def by_history(
    recommender: Recommender, client: str, history: Sequence[int | str], k: int = K
) -> list[Place]:
    (answer,) = ask(recommender, ByHistory(client=client, history=[*history], k=k))
    return answer.items


def items_of(ranking: list[Place]) -> list[int]:
    return [place.item_id for place in ranking]


def ndcgs(recommender: Recommender, data: Dataset, client: str) -> list[float]:
    """NDCG@10 of a client's test users, by its definition."""
    held = data.shard(client).held_out(2)
    queries = [ByUser(client=client, user_id=u, as_of="test") for u in held.users.tolist()]
    values = []
    for answer, truth in zip(ask(recommender, *queries), held.truth, strict=True):
        relevant = set(data.item_ids[truth].tolist())
        gains = [1 / math.log2(p.rank + 1) for p in answer.items if p.item_id in relevant]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), K) + 1))
        values.append(sum(gains) / ideal)
    return values


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"server": {"shared_adapter": True}},
        {"method": {"kind": "central"}},
        {"model": {"prior": False, "cut": 0, "top": 0}, "train": {"share": "none"}},
        {"method": {"kind": "fedpa_lora"}, "train": {"learning_rate": 0.1}},
    ],
    ids=["fellrec", "shared", "central", "bare", "levels"],
)
def test_the_rankings_are_those_of_the_evaluation(
    tiny_config: Callable[..., RunConfig], tiny_data: Path, overrides: dict[str, object]
) -> None:
    check_rankings(train(tiny_config(clients={"per_actor": 5}, **overrides)), tiny_data)


def test_clients_of_their_own_rank_are_evaluated_alike(
    tiny_config: Callable[..., RunConfig], tiny_data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.csv"
    own.write_text("client,rank\nc0,1\nc3,2\n")
    config = tiny_config(
        clients={"own": str(own)},
        model={"lora": {"r": 4}},
        method={"kind": "fedavg"},
        server={"shared_adapter": True},
        train={"learning_rate": 0.05},
    )
    trained = train(config)
    own.unlink()  # the run has written it down
    check_rankings(trained, tiny_data)


def check_rankings(trained: Trained, tiny_data: Path) -> None:
    data = Dataset(tiny_data)
    with opened(trained.folder, round=LAST, adapters=2) as recommender:
        assert recommender.clients == data.clients
        values = {client: ndcgs(recommender, data, client) for client in recommender.clients}
    for client, own in values.items():
        expected = trained.test[client].means()["ndcg@10"]
        assert sum(own) / len(own) == pytest.approx(expected, abs=1e-9)
    every = [value for own in values.values() for value in own]
    expected = pool(trained.test)["ndcg@10"]
    assert sum(every) / len(every) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < 1


@pytest.mark.parametrize("gpus", [{}, {"recommender_gpus": 0.5}, {"trunk_gpus": 1}])
def test_each_side_asks_for_the_gpu_it_was_given(
    gpus: dict[str, float], trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: dict[str, bool] = {}

    def listen(side: str) -> Callable[[bool], torch.device]:
        def answer(asked: bool) -> torch.device:
            heard[side] = asked
            return torch.device("cpu")

        return answer

    for side, module in (("recommender_gpus", near), ("trunk_gpus", far)):
        monkeypatch.setattr(module, "choose_device", listen(side))
    with opened(trained.folder, **gpus):
        pass
    assert heard == {side: side in gpus for side in ("recommender_gpus", "trunk_gpus")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray 2.60's own use of pydantic
def test_replicas_come_when_batches_are_half_full(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    from fellray.serve.app import build

    told: dict[str, dict[str, Any]] = {}

    def deploy(cls: type, name: str, **options: Any) -> Any:
        told[name] = options
        return SimpleNamespace(bind=lambda *given: name)

    monkeypatch.setattr(serve, "deployment", deploy)
    monkeypatch.setattr(serve, "ingress", lambda: lambda cls: cls)
    new_token(Storage(run_copy), None)

    def scale(**settings: int) -> list[dict[str, float] | int]:
        build(Args.model_validate({"run": str(run_copy), **settings}))
        return [
            told[name].get("autoscaling_config") or told[name]["num_replicas"]
            for name in ("Recommender", "Trunk")
        ]

    assert scale(recommenders=2) == [2, 1]
    at_most = {"min_replicas": 1, "max_replicas": 3}
    assert scale(most_recommenders=3, most_trunks=3) == [
        at_most | {"target_ongoing_requests": 64},
        at_most | {"target_ongoing_requests": 4},
    ]
    alone, _ = scale(most_recommenders=3, rows=1)
    assert alone == at_most | {"target_ongoing_requests": 1}
    few, _ = scale(most_recommenders=3, waiting=10)
    assert few == at_most | {"target_ongoing_requests": 5}


def test_titles_rank_like_the_items_they_name(recommender: Recommender, tiny_data: Path) -> None:
    data = Dataset(tiny_data)
    unique = [i for i, title in enumerate(data.titles) if data.titles.count(title) == 1]
    history = unique[:9]  # longer than model.max_history
    ids, titles = data.item_ids[history].tolist(), [data.titles[i] for i in history]
    for client in recommender.clients:
        expected = by_history(recommender, client, ids)
        mixed = [title if at % 2 else ids[at] for at, title in enumerate(titles)]
        assert by_history(recommender, client, titles) == expected
        assert by_history(recommender, client, mixed) == expected
        assert [place.rank for place in expected] == list(range(1, K + 1))
        scores = [place.score for place in expected]
        assert scores == sorted(scores, reverse=True)
        named = [data.titles[data.item_ids.tolist().index(p.item_id)] for p in expected]
        assert [place.title for place in expected] == named


def test_order_matters_and_only_the_newest_are_read(recommender: Recommender) -> None:
    client = recommender.clients[0]
    titles = [f"word{i:02d} word{i + 1:02d} word{i + 2:02d}" for i in range(0, 18, 3)]
    whole = by_history(recommender, client, titles)
    assert by_history(recommender, client, titles[::-1]) != whole
    assert by_history(recommender, client, ["word40 word41", *titles]) == whole


def test_every_item_of_a_met_title_is_left_out(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    titles = ["word01", "Word02 word03", "word04", "word02 WORD03", "word05"]
    rows = [(user, item + 10, titles[item]) for user in range(4) for item in range(5)]
    lines = ["user_id,item_id,title,timestamp", *(f"{u},{i},{t},{i}" for u, i, t in rows)]
    (tmp_path / "source.csv").write_text("\n".join(lines) + "\n")
    data = {
        "path": str(tmp_path / "prepared"),
        "source": str(tmp_path / "source.csv"),
        "k_core": 1,
        "partition": {"kind": "per_user"},
    }
    config = tiny_config(data=data, train={"rounds": 0})
    prepare(config)
    with opened(train(config).folder) as recommender:
        client = recommender.clients[0]
        ranking = by_history(recommender, client, ["  WORD02 word03 "], k=5)
        assert sorted(items_of(ranking)) == [10, 12, 14]
        assert [place.rank for place in ranking] == [1, 2, 3]
        foreign = by_history(recommender, client, ["word02 word03 word04"], k=5)
        assert sorted(items_of(foreign)) == [10, 11, 12, 13, 14]


def test_the_prior_is_the_clients_own(
    tiny_config: Callable[..., RunConfig], recommender: Recommender, tiny_data: Path
) -> None:
    """The same adapters with and without it: scores differ by the client's counts."""
    data, folder = Dataset(tiny_data), train(tiny_config(train={"rounds": 0})).folder
    bare = train(tiny_config(train={"rounds": 0}, model={"prior": False})).folder
    num_items, titles = len(data.titles), ["word01 word02 not a title"]
    with opened(folder) as with_prior, opened(bare) as without:
        for client in data.clients[:2]:
            difference = {
                p.item_id: p.score for p in by_history(with_prior, client, titles, num_items)
            }
            for place in by_history(without, client, titles, num_items):
                difference[place.item_id] -= place.score
            got = [difference[item] for item in data.item_ids.tolist()]
            counts = data.shard(client).counts(num_items)
            np.testing.assert_allclose(got, np.log1p(counts), atol=1e-5)


def test_queries_that_wait_together_do_not_mix_clients(trained: Trained) -> None:
    """Whoever shares the crossing, and however often adapters are evicted, a bit never changes."""
    titles: list[list[int | str]] = [["word01 word02", "word03"], ["word04"], ["word05"] * 6]
    with opened(trained.folder, round=LAST, adapters=2, rows=4) as recommender:
        queries = [
            ByHistory(client=client, history=history)
            for history in titles
            for client in recommender.clients
        ] * 4
        alone = [ask(recommender, query)[0] for query in queries]
        assert ask(recommender, *queries) == alone
        assert len({answer.items[0].score for answer in alone}) > len(recommender.clients)


def test_another_round_is_another_model(
    trained: Trained, recommender: Recommender, tiny_data: Path
) -> None:
    titles = ["word01 word02"]
    client = recommender.clients[0]
    with opened(trained.folder, round=0) as start:
        assert by_history(recommender, client, titles) != by_history(start, client, titles)
    with opened(trained.folder) as best, opened(trained.folder, round="latest") as latest:
        assert best.served.round == trained.best
        assert latest.served.round == LAST


def test_a_history_as_text(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    """A semicolon inside a title of the catalogue does not divide it."""
    items = recommender.items
    monkeypatch.setitem(items._of_title, "moby-dick; or, the whale", [0])
    text = "Nobody; knows;;Moby-Dick; or, The Whale ; word01; Moby-Dick"
    titles = ["Nobody", "knows", "Moby-Dick; or, The Whale", "word01", "Moby-Dick"]
    assert items.split_history(text) == titles
    assert [items.knows(title) for title in titles] == [False, False, True, False, False]
    assert items.split_history(" ; ") == []


def test_mistakes_in_a_query_are_named(recommender: Recommender, tiny_data: Path) -> None:
    client, data = recommender.clients[0], Dataset(tiny_data)

    def refused(*queries: ByUser | ByHistory) -> tuple[int, str, str | None]:
        with pytest.raises(Refusal) as caught:
            ask(recommender, *queries)
        return caught.value.status, caught.value.code, caught.value.field

    item = int(data.item_ids[0])
    good = ByHistory(client=client, history=["word01"])
    assert refused(ByHistory(client=client, history=["word01", item, -7])) == (
        404,
        "unknown_item",
        "history.2",
    )
    assert refused(ByUser(client=client, user_id=10**6)) == (404, "unknown_user", "user_id")
    assert refused(ByUser(client="nobody", user_id=0)) == (404, "unknown_user", "user_id")
    assert refused(good, ByUser(client=client, user_id=10**6))[2] == "queries.1.user_id"
    for field in ("candidates", "filters.allow", "filters.deny"):
        inner = {field.rpartition(".")[2]: [item, 999]}
        body = {"filters": inner} if "." in field else inner
        query = ByHistory.model_validate({"client": client, "history": [item], **body})
        assert refused(query) == (404, "unknown_item", f"{field}.1")
    query = ByHistory(client=client, history=[item], filters=Filters(categories=["Noir"]))
    assert refused(query) == (404, "unknown_category", "filters.categories.0")


def test_only_committed_rounds_are_opened(run_copy: Path, tiny_data: Path) -> None:
    for round in (7, -1):
        with pytest.raises(FellrayError, match=rf"round {round} is not committed; .*: 0, 1, 2"):
            open_whole(Args(run=str(run_copy), round=round))
    with pytest.raises(FellrayError, match="holds no run"):
        open_whole(Args(run=str(run_copy / "rounds")))
    trunk = run_copy / "rounds/000002/trunk-00000.safetensors"
    damaged = bytearray(trunk.read_bytes())
    damaged[-1] ^= 1
    trunk.write_bytes(damaged)
    run = read_run(str(run_copy))
    verify(run, 1, Dataset(tiny_data).clients)
    with pytest.raises(FellrayError, match=r"trunk-00000\.safetensors: is damaged"):
        verify(run, 2, Dataset(tiny_data).clients)
    shutil.rmtree(run_copy / "rounds")
    with pytest.raises(FellrayError, match="no round is committed yet"):
        open_whole(Args(run=str(run_copy)))


def test_a_round_that_may_go_is_not_pinned(run_copy: Path) -> None:
    run = read_run(str(run_copy))
    refuse_passing(Args(run=str(run_copy), round=1), run)
    with run.storage.lock("train"):
        for safe in ("best", "latest", 0):
            refuse_passing(Args.model_validate({"run": str(run_copy), "round": safe}), run)
        with pytest.raises(FellrayError, match=r"round=1: .* is being trained, .*promote .* 1` k"):
            refuse_passing(Args(run=str(run_copy), round=1), run)
        promote(run.storage, 1, run.rounds.committed)
        refuse_passing(Args(run=str(run_copy), round=1), run)


def test_only_the_runs_own_data_and_encoder_are_used(
    run_copy: Path, tiny_data: Path, tiny_encoder: Path, tiny_roberta: Path, tmp_path: Path
) -> None:
    config = json.loads((run_copy / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "elsewhere")
    (run_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FellrayError, match="elsewhere: is no prepared folder"):
        open_whole(Args(run=str(run_copy)))
    shutil.copytree(tiny_data, tmp_path / "elsewhere")
    open_whole(Args(run=str(run_copy))).close()
    manifest = tmp_path / "elsewhere/manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(FellrayError, match=r"elsewhere: holds other data than .*tiny was trained"):
        open_whole(Args(run=str(run_copy)))
    config["data"]["path"] = str(tiny_data)
    config["model"]["name"] = str(tiny_roberta)
    (run_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FellrayError, match=r"tiny-roberta: has other weights"):
        open_whole(Args(run=str(run_copy)))
