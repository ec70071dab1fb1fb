"""Promises 1 to 3 and 7: one process or many, DeepSpeed or torch, the same run bit by bit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from fellray.actors import plant as plants
from fellray.actors.client import Client
from fellray.actors.plant import Plant
from fellray.actors.world import World, survey
from fellray.jobs.train import one_round
from fellray.platform.config import RunConfig
from fellray.platform.rounds import Rounds
from fellray.platform.run import open_run
from fellray.platform.summary import HASHED

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    # DeepSpeed 0.19 imports parts of torch that torch itself has deprecated
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CROSSED = {
    *("activation", "output", "gradient", "input_gradient", "activation_repeat", "envelope"),
    *("evaluation_activation", "evaluation_output"),
}
"""Kinds of the ledger that go through the cut."""
LONG = pytest.mark.long
LAYOUTS = [
    pytest.param("deepspeed", 1, marks=LONG),
    ("deepspeed", 2),
    pytest.param("deepspeed", 5, marks=LONG),
    pytest.param("torch", 1, marks=LONG),
    pytest.param("torch", 2, marks=LONG),
    pytest.param("torch", 5, marks=LONG),
]

Make = Callable[[RunConfig, World, Rounds], Plant]
Configure = Callable[..., RunConfig]


@dataclass(frozen=True)
class Record:
    """What a run came to."""

    hashes: list[dict[str, str]]
    """Per round: client -> hash of its adapters."""
    shared: list[dict[str, Any]]
    """Per round: the files that belong to nobody (the shared adapter), by content."""
    metrics: list[dict[str, Any]]
    """Per round, without times: losses, mixing, validation."""
    ledger: list[dict[str, Any]]
    """Every client's entries with their digests."""


def record(config: RunConfig, make: Make) -> Record:
    """Drive a run through its rounds, as jobs/train.py does."""
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        make(config, world, run.rounds) as plant,
    ):
        for t in run.to_go():
            outcome = plant.replayed(one_round, t, config)
            run.commit(t, outcome, plant.close_ledger(), plant.take_events())
        times = ("seconds", "samples_per_second")
        return Record(
            [run.rounds.hashes(t, HASHED, plant.learners) for t in run.rounds.committed()],
            [
                {n: run.rounds.load_shared(t, f"shared.{n}").tolist() for n in ("values", "steps")}
                for t in run.rounds.committed()
                if config.server.shared_adapter
            ],
            [
                {k: v for k, v in row.items() if k not in times}
                for row in run.journal.rows("metrics")
            ],
            run.journal.rows("ledger"),
        )


def settings(engine: str, **clients: int) -> dict[str, Any]:
    """Both engines with the adapter that DeepSpeed's own optimizer trains."""
    return {
        "server": {"engine": engine, "shared_adapter": True},
        "clients": clients,
        "train": {"rounds": 2},
        "keep_last": 3,
    }


@pytest.fixture(scope="module")
def reference(tiny_config: Configure) -> Record:
    """Torch, one process, one client per actor."""
    return record(tiny_config(**settings("torch", per_actor=1)), Plant.inline)


def test_the_reference_has_something_to_compare(reference: Record) -> None:
    start, first, second = reference.hashes
    assert len(set(start.values())) == 1
    assert len(set(second.values())) == 5
    assert first != second
    assert reference.shared[1] != reference.shared[2]
    kinds = {row["kind"] for row in reference.ledger}
    assert kinds == CROSSED | {"adapter_up", "adapter_down", "loss"}


@pytest.mark.parametrize(("engine", "per_actor"), LAYOUTS)
def test_ray_equals_one_process(
    engine: str, per_actor: int, reference: Record, tiny_config: Configure, local_ray: None
) -> None:
    """Promise 2, and promise 1 through Ray: the ledger's digests are those of the gradients."""
    config = tiny_config(**settings(engine, per_actor=per_actor))
    assert record(config, Plant.on_ray) == reference


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "train"),
    [("ditto", {"optimizer": "adamw"}), ("scaffold", {"optimizer": "sgd"})],
    ids=["two trainings", "control variates"],
)
def test_what_a_rule_of_local_training_keeps_is_the_same_on_ray(
    method: str, train: dict[str, Any], tiny_config: Configure, local_ray: None
) -> None:
    """Actors of two servers, side by side in one bank, and one process."""
    common = {"method": {"kind": method}, "train": train | {"rounds": 2}}
    one = record(tiny_config(**common), Plant.inline)
    many = {"clients": {"per_actor": 2}, "server": {"engine": "torch", "count": 2}}
    assert record(tiny_config(**common | many), Plant.on_ray) == one


@pytest.mark.parametrize(("engine", "per_actor"), [("deepspeed", 2), ("torch", 5)])
def test_one_process_deals_as_it_likes(
    engine: str, per_actor: int, reference: Record, tiny_config: Configure
) -> None:
    """Promises 2 and 7 without Ray."""
    assert record(tiny_config(**settings(engine, per_actor=per_actor)), Plant.inline) == reference


@pytest.mark.long
def test_a_model_that_writes(tiny_writer: Configure, local_ray: None) -> None:
    """Training under DeepSpeed and generation by two actors at once, against one process."""
    few = {"evaluation": {"max_users": 3}, "train": {"rounds": 1}}
    alone = tiny_writer("qwen3", **settings("torch", per_actor=1) | few)
    config = tiny_writer("qwen3", **settings("deepspeed", per_actor=2) | few)
    assert record(config, Plant.on_ray) == record(alone, Plant.inline)


def test_any_order_of_arrival(
    reference: Record, tiny_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 3: who is asked last is asked first."""

    class Backwards(plants.InlinePool):
        def map(self, method: str, *columns: Any, among: Sequence[int] | None = None) -> list[Any]:
            asked = list(range(len(self.members)) if among is None else among)[::-1]
            backwards = (list(column)[::-1] for column in columns)
            return super().map(method, *backwards, among=asked)[::-1]

    monkeypatch.setattr(plants, "InlinePool", Backwards)
    assert record(tiny_config(**settings("torch", per_actor=1)), Plant.inline) == reference


@pytest.mark.long
def test_the_ledger_is_what_the_transport_counted(
    reference: Record, tiny_config: Configure, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6, second half, and promise 3 through Ray: the first actor answers last."""

    class Counting(Client):
        def fit(self, round: int, clients: Sequence[str], *more: Any) -> Any:
            update = super().fit(round, clients, *more)
            time.sleep(0.3 if "c0" in self.learners else 0.0)
            return update

        def counted(self) -> int:
            return self._span.remote.bytes  # type: ignore[attr-defined]

    carried: list[int] = []

    class Watched(Plant):
        _client = Counting

        def close(self) -> None:
            carried.extend(self._clients.map("counted"))
            super().close()

    ran = record(tiny_config(**settings("torch", per_actor=3)), Watched.on_ray)
    assert ran == reference
    assert len(carried) == 2
    entered = sum(row["bytes"] for row in ran.ledger if row["kind"] in CROSSED)
    assert entered == sum(carried) > 0
