"""Over HTTP it is the evaluation: rankings, scores and NDCG@10 of a run's own summary.

Of a run that is there already: `FELLRAY_RUN=runs/demo pytest -m long -s` with this file.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver import Driver, wait_until
from test_served_events import Quiet
from test_serving import up

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs import opening
from fellray.jobs import train as training
from fellray.jobs.ports import find_ports
from fellray.jobs.prepare import prepare
from fellray.platform.config import RunConfig
from fellray.platform.metrics import Evaluator
from fellray.platform.run import Run, read_run
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve.client import Client
from fellray.serve.schema import Answer, ByUser
from fellray.serve.tokens import new_token

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(3000)]
TEST = 2
COMPARED = 200
TOGETHER = 64


def make_run(
    make: Callable[..., RunConfig], folder: Path, monkeypatch: pytest.MonkeyPatch, users: int = 240
) -> str:
    """Prepared and trained in this process, on data of its own; the run's folder."""
    draw = np.random.default_rng(8)
    titles = [" ".join(f"word{n:02d}" for n in draw.integers(0, 60, 4)) for _ in range(80)]
    lines = ["user_id,item_id,title,timestamp"]
    for user in range(users):
        items = draw.choice(80, draw.integers(6, 13), replace=False)
        lines += [f"{user},{item},{titles[item]},{at + 1}" for at, item in enumerate(items)]
    source = folder / "source.csv"
    source.write_text("\n".join(lines) + "\n")
    parts = {"kind": "kmeans", "num_clients": 5, "dim": 4, "epochs": 2}
    data = {"path": str(folder / "prepared"), "source": str(source), "k_core": 1}
    config = make(storage=str(folder / "runs"), data={**data, "partition": parts})
    prepare(config)
    monkeypatch.setattr(Plant, "on_ray", Plant.inline)
    monkeypatch.setattr(opening, "connect", lambda *_: nullcontext())
    monkeypatch.setattr(training, "RunTelemetry", Quiet)
    training.train(config)
    monkeypatch.undo()
    return f"{config.storage}/{config.name}"


def evaluate_users(run: Run, round: int) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """(client, user) -> scores of all items as `fellray evaluate` has them, and those left out."""
    config = run.config
    # one crew: clients are evaluated in their order
    clients = config.clients.model_copy(update={"crews": 1})
    config = config.model_copy(update={"clients": clients})
    data = Dataset(config.data.path)
    rows: list[tuple[np.ndarray, np.ndarray]] = []

    def listen(
        self: Evaluator, scores: torch.Tensor, seen: Sequence[np.ndarray], truth: object
    ) -> None:
        rows.extend(zip(scores.numpy().copy(), seen, strict=True))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Evaluator, "add", listen)
        patched.setattr(Evaluator, "score", lambda self: None)
        with Plant.inline(config, survey(config, run.own()), run.rounds) as plant:
            plant.evaluate(round, TEST)
    users = [
        (client, user)
        for client in data.clients
        for user in data.shard(client).held_out(TEST).users.tolist()
    ]
    return dict(zip(users, rows, strict=True))


@pytest.fixture
def folder(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The environment's, or a tiny one."""
    named = os.environ.get("FELLRAY_RUN")
    return os.path.abspath(named) if named else make_run(tiny_config, tmp_path, monkeypatch)


@pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own, with some encoders
def test_rankings_and_quality_are_those_of_the_summary(folder: str, tmp_path: Path) -> None:
    run = read_run(folder)
    summary: dict[str, Any] = run.read_json("summary.json")
    data = Dataset(run.config.data.path)
    held = evaluate_users(run, summary["best_round"])
    users = list(held)
    token = new_token(Storage(str(tmp_path / "tokens")), None)  # the run stays as it is
    (port,) = find_ports(1)
    driver = Driver.python(
        *("-m", "fellray.jobs.cli", "serve", folder, f"--port={port}", "cpus=0.5"),
        *(f"tokens={tmp_path / 'tokens'}", f"events={tmp_path / 'events'}"),
        log=tmp_path / "driver",
    )
    try:
        wait_until(lambda: up(driver), 400, "the application says that it serves", pause_s=0.2)
        with Client(f"http://127.0.0.1:{port}", token, timeout_s=300) as client:
            few = users[:: max(1, len(users) // COMPARED)]
            compared = dict(zip(few, ask(client, few, k=min(1000, len(data.titles))), strict=True))
            answers = ask(client, users, k=10)
    finally:
        driver.end()
    worst = 0.0
    for user, answer in compared.items():
        worst = max(worst, check_ranking(answer, *held[user], data.item_ids))
    per_client: dict[str, list[float]] = {}
    for (name, user), answer in zip(users, answers, strict=True):
        per_client.setdefault(name, []).append(ndcg(answer, truth_of(data, name, user)))
    found = {name: float(np.mean(values)) for name, values in per_client.items()}
    pooled = float(np.mean([value for values in per_client.values() for value in values]))
    said = {name: row["ndcg@10"] for name, row in summary["per_client"].items()}
    print(
        f"{folder}: {len(compared)} users of {len({c for c, _ in compared})} clients compared, "
        f"scores within {worst:.1e}; NDCG@10 of {len(users)} users over HTTP {pooled:.9f}, of the "
        f"summary {summary['test']['ndcg@10']:.9f}"
    )
    assert {client for client, _ in compared} == set(data.clients)
    assert len(compared) >= min(COMPARED, len(users))
    assert found == pytest.approx(said, abs=1e-9)
    assert pooled == pytest.approx(summary["test"]["ndcg@10"], abs=1e-9)


def ask(client: Client, users: Sequence[tuple[str, int]], k: int) -> list[Answer]:
    queries = [ByUser(client=name, user_id=user, as_of="test", k=k) for name, user in users]
    together = TOGETHER if k <= 10 else 4
    batches = (queries[at : at + together] for at in range(0, len(queries), together))
    return [answer for batch in batches for answer in client.recommend_batch(batch)]


def check_ranking(
    answer: Answer, scores_I: np.ndarray, seen: np.ndarray, item_ids: np.ndarray
) -> float:
    """The largest difference of two scores. Ties stand by item id, as items do."""
    left = np.setdiff1d(np.arange(len(scores_I)), seen)
    order = left[np.argsort(-scores_I[left], kind="stable")][: len(answer.items)]
    assert [place.item_id for place in answer.items] == item_ids[order].tolist()
    found = np.array([place.score for place in answer.items])
    np.testing.assert_allclose(found, scores_I[order], atol=1e-5, rtol=0)
    return float(np.abs(found - scores_I[order]).max(initial=0.0))


def truth_of(data: Dataset, client: str, user: int) -> int:
    shard = data.shard(client)
    at = int(np.searchsorted(shard.users, user))
    rows = slice(int(shard.offsets[at]), int(shard.offsets[at + 1]))
    (item,) = shard.items[rows][shard.splits[rows] == TEST].tolist()
    return int(data.item_ids[item])


def ndcg(answer: Answer, truth: int) -> float:
    """At 10, with one item that is right."""
    ranks = [place.rank for place in answer.items if place.item_id == truth]
    return float(1 / np.log2(ranks[0] + 1)) if ranks else 0.0
