"""What is recommended is what was evaluated, for the client that asked, and mistakes are named."""

import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.prepare import prepare
from fellray.platform.aggregation import reduce
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.metrics import Score
from fellray.platform.run import Outcome, open_run, pool
from fellray.platform.shards import Dataset
from fellray.serve.recommender import Recommendation, Recommender

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
                staged = p.install(reports, plan, reduce(plan, reports.theta_CP))
                outcome = Outcome(staged, p.validate(t), reports, plan)
            run.commit(t, outcome, p.close_ledger(), p.take_events())
        test = p.evaluate(config.train.rounds, 2)
        return Trained(f"{config.storage}/{config.name}", run.best_round(), test)


@pytest.fixture(scope="module")
def trained(tiny_config: Callable[..., RunConfig]) -> Trained:
    return train(tiny_config(clients={"per_actor": 5}, keep_last=LAST + 1))


@pytest.fixture(scope="module")
def recommender(trained: Trained) -> Recommender:
    return Recommender.open(trained.folder, LAST)


@pytest.fixture
def run_copy(trained: Trained, tmp_path: Path) -> Path:
    shutil.copytree(trained.folder, tmp_path / "tiny")
    return tmp_path / "tiny"


def items_of(ranking: list[Recommendation]) -> list[int]:
    return [place.item_id for place in ranking]


def ndcgs(recommender: Recommender, data: Dataset, client: str) -> list[float]:
    """NDCG@10 of a client's test users, by its definition."""
    held = data.shard(client).held_out(2)
    values = []
    for ranking, truth in zip(
        recommender.recommend_users(client, held.histories, K), held.truth, strict=True
    ):
        relevant = set(data.item_ids[truth].tolist())
        gains = [1 / math.log2(p.rank + 1) for p in ranking if p.item_id in relevant]
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
    ],
    ids=["fellrec", "shared", "central", "bare"],
)
def test_the_rankings_are_those_of_the_evaluation(
    tiny_config: Callable[..., RunConfig], tiny_data: Path, overrides: dict[str, object]
) -> None:
    trained = train(tiny_config(clients={"per_actor": 5}, **overrides))
    recommender = Recommender.open(trained.folder, LAST)
    data = Dataset(tiny_data)
    assert recommender.clients == data.clients
    values = {client: ndcgs(recommender, data, client) for client in recommender.clients}
    for client, own in values.items():
        expected = trained.test[client].means()["ndcg@10"]
        assert sum(own) / len(own) == pytest.approx(expected, abs=1e-9)
    every = [value for own in values.values() for value in own]
    expected = pool(trained.test)["ndcg@10"]
    assert sum(every) / len(every) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < 1


def test_titles_rank_like_the_items_they_name(recommender: Recommender, tiny_data: Path) -> None:
    data = Dataset(tiny_data)
    unique = [i for i, title in enumerate(data.titles) if data.titles.count(title) == 1]
    history = np.array(unique[:9])  # longer than model.max_history
    for client in recommender.clients:
        titles = [data.titles[i] for i in history]
        (expected,) = recommender.recommend_users(client, [history])
        assert recommender.recommend(client, titles) == expected
        assert [place.rank for place in expected] == list(range(1, K + 1))
        scores = [place.score for place in expected]
        assert scores == sorted(scores, reverse=True)
        named = [data.titles[data.item_ids.tolist().index(p.item_id)] for p in expected]
        assert [place.title for place in expected] == named


def test_order_matters_and_only_the_newest_are_read(recommender: Recommender) -> None:
    client = recommender.clients[0]
    titles = [f"word{i:02d} word{i + 1:02d} word{i + 2:02d}" for i in range(0, 18, 3)]
    whole = recommender.recommend(client, titles)
    assert recommender.recommend(client, titles[::-1]) != whole
    assert recommender.recommend(client, ["word40 word41", *titles]) == whole


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
    recommender = Recommender.open(train(config).folder)
    client = recommender.clients[0]
    ranking = recommender.recommend(client, ["  WORD02 word03 "], k=5)
    assert sorted(items_of(ranking)) == [10, 12, 14]
    assert [place.rank for place in ranking] == [1, 2, 3]
    foreign = recommender.recommend(client, ["word02 word03 word04"], k=5)
    assert sorted(items_of(foreign)) == [10, 11, 12, 13, 14]


def test_the_prior_is_the_clients_own_and_can_be_left_out(
    recommender: Recommender, tiny_data: Path
) -> None:
    data = Dataset(tiny_data)
    num_items, titles = len(data.titles), ["word01 word02 not a title"]
    for client in recommender.clients[:2]:
        ranked = recommender.recommend(client, titles, num_items)
        bare = recommender.recommend(client, titles, num_items, with_prior=False)
        difference = {p.item_id: p.score for p in ranked}
        for place in bare:
            difference[place.item_id] -= place.score
        counts = data.shard(client).counts(num_items)
        got = [difference[item] for item in data.item_ids.tolist()]
        np.testing.assert_allclose(got, np.log1p(counts), atol=1e-5)


def test_clients_have_models_of_their_own(recommender: Recommender) -> None:
    titles = ["word01 word02", "word03"]
    scores = {
        tuple(p.score for p in recommender.recommend(client, titles, with_prior=False))
        for client in recommender.clients
    }
    assert len(scores) == len(recommender.clients)


def test_threads_do_not_mix_clients(recommender: Recommender) -> None:
    titles = ["word01 word02", "word03"]
    clients = [*recommender.clients] * 8
    alone = [recommender.recommend(client, titles) for client in clients]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda c: recommender.recommend(c, titles), clients)) == alone


def test_another_round_is_another_model(trained: Trained, recommender: Recommender) -> None:
    start = Recommender.open(trained.folder, round=0)
    titles = ["word01 word02"]
    scores = {  # round 0 is the one start that all clients share
        tuple(p.score for p in start.recommend(client, titles, with_prior=False))
        for client in start.clients
    }
    assert len(scores) == 1
    client = start.clients[0]
    assert recommender.recommend(client, titles) != start.recommend(client, titles)
    assert Recommender.open(trained.folder).round == trained.best


def test_a_history_as_text(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    """A semicolon inside a title of the catalogue does not divide it."""
    monkeypatch.setitem(recommender._items_of, "moby-dick; or, the whale", [0])
    text = "Nobody; knows;;Moby-Dick; or, The Whale ; word01; Moby-Dick"
    titles = ["Nobody", "knows", "Moby-Dick; or, The Whale", "word01", "Moby-Dick"]
    assert recommender.split_history(text) == titles
    assert [recommender.knows(title) for title in titles] == [False, False, True, False, False]
    assert recommender.split_history(" ; ") == []


def test_mistakes_in_a_request_are_named(recommender: Recommender) -> None:
    client = recommender.clients[0]
    with pytest.raises(
        FellrayError, match=rf"'{client}x': .* it has {', '.join(recommender.clients)}$"
    ):
        recommender.recommend(f"{client}x", ["word01"])
    for titles in ([], ["word01", "  "], "word01"):
        with pytest.raises(FellrayError, match="list of at least one title"):
            recommender.recommend(client, titles)
    for k in (0, 51):
        with pytest.raises(FellrayError, match=f"k={k}: must be from 1 to 50"):
            recommender.recommend(client, ["word01"], k=k)
        with pytest.raises(FellrayError, match=f"k={k}"):
            recommender.recommend_users(client, [], k=k)
    for items in ([], [50], [-1]):
        with pytest.raises(FellrayError, match=r"histories\[1\]: .* from 0 to 49"):
            recommender.recommend_users(client, [np.array([1]), np.array(items, np.int64)])
    assert recommender.recommend_users(client, []) == []


def test_only_committed_rounds_are_opened(run_copy: Path) -> None:
    for round in (7, -1):
        with pytest.raises(FellrayError, match=rf"round {round} is not committed; .*: 0, 1, 2"):
            Recommender.open(str(run_copy), round)
    with pytest.raises(FellrayError, match="holds no run"):
        Recommender.open(str(run_copy / "rounds"))
    trunk = run_copy / "rounds/000002/trunk-00000.safetensors"
    damaged = bytearray(trunk.read_bytes())
    damaged[-1] ^= 1
    trunk.write_bytes(damaged)
    with pytest.raises(FellrayError, match=r"trunk-00000\.safetensors: is damaged"):
        Recommender.open(str(run_copy), 2)
    shutil.rmtree(run_copy / "rounds")
    with pytest.raises(FellrayError, match="no round is committed yet"):
        Recommender.open(str(run_copy))


def test_only_the_runs_own_data_and_encoder_are_used(
    run_copy: Path, tiny_data: Path, tiny_encoder: Path, tiny_roberta: Path, tmp_path: Path
) -> None:
    config = json.loads((run_copy / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "elsewhere")
    (run_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FellrayError, match="elsewhere: is no prepared folder"):
        Recommender.open(str(run_copy))
    shutil.copytree(tiny_data, tmp_path / "elsewhere")
    Recommender.open(str(run_copy))
    manifest = tmp_path / "elsewhere/manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(FellrayError, match=r"elsewhere: holds other data than .*tiny was trained"):
        Recommender.open(str(run_copy))
    config["data"]["path"] = str(tiny_data)
    config["model"]["name"] = str(tiny_roberta)
    (run_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FellrayError, match=r"tiny-roberta: has other weights"):
        Recommender.open(str(run_copy))
