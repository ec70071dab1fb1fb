"""A run in one process: any grouping, refusals, what is shared, what is sent (promises 2, 3, 6)."""

import dataclasses
import json
import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fellray.actors import plant as plants
from fellray.actors.plant import Plant
from fellray.actors.pool import InlinePool
from fellray.actors.server import make_host
from fellray.actors.world import survey
from fellray.platform.aggregation import Reports, reduce
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.faults import TRIES
from fellray.platform.host import TrunkHost
from fellray.platform.in_process import InProcess
from fellray.platform.ledger import total
from fellray.platform.messages import (
    Activation,
    Gradient,
    Installation,
    Lease,
    LedgerRow,
    StaleLease,
    Update,
)
from fellray.platform.metrics import Score
from fellray.platform.rounds import Rounds
from fellray.platform.seating import deal
from fellray.platform.shards import Dataset
from fellray.platform.span import Answer
from fellray.platform.storage import Storage

EACH = {"per_actor": 1}
"""One client per actor; `tiny_config` puts all five into one."""
Play = Callable[..., Any]
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def plain(tiny_config: Make, play: Play) -> Play:
    """`plain(train=...)`: an undisturbed run; the same settings are played once."""
    known: dict[str, Any] = {}

    def run(last: int | None = None, **overrides: Any) -> Any:
        key = json.dumps([last, overrides], sort_keys=True)
        if key not in known:
            known[key] = play(tiny_config(**overrides), last=last)
        return known[key]

    return run


def clients_of(plant: Plant) -> list[Any]:
    return list(plant._clients.members)  # type: ignore[attr-defined]


def host_of(plant: Plant) -> TrunkHost:
    (host,) = plant._servers.pool.members  # type: ignore[attr-defined]
    return host


def held(played: Any, round: int, name: str) -> Tensor:
    return played.rounds.load(round, played.learners, [name])[name]


def test_deal() -> None:
    assert deal(["a", "b", "c", "d", "e"], 2) == [("a", "b"), ("c", "d"), ("e",)]
    assert deal(["a"], 9) == [("a",)]


# --- any grouping (promise 2, in one process) ---------------------------------------------------


@pytest.mark.parametrize("server", [{}, {"shared_adapter": True}], ids=["personal", "shared"])
def test_any_grouping_gives_the_same_run(server: dict[str, Any], plain: Play) -> None:
    runs = [
        plain(clients={"per_actor": n}, server=server, train={"moments": "keep"}) for n in (1, 2, 5)
    ]
    one, *others = runs
    assert len({*one.hashes(1).values()}) == 5, "five clients, five mixtures"
    for other in others:
        for t in range(3):
            assert other.hashes(t) == one.hashes(t)
            assert other.outcomes[t].validation == one.outcomes[t].validation
            assert other.ledger[t] == one.ledger[t]
        for t in (1, 2):
            assert other.losses(t) == one.losses(t)
            assert torch.equal(other.outcomes[t].plan.mixing_CC, one.outcomes[t].plan.mixing_CC)
            if server:
                same = [r.rounds.load_shared(t, "shared.values") for r in (one, other)]
                assert torch.equal(*same)


# --- several servers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "kept"), [(2, 512), (3, 0), pytest.param(5, 512, marks=pytest.mark.long)]
)
def test_any_number_of_servers_gives_the_same_run(count: int, kept: int, plain: Play) -> None:
    """Where what a forward leaves is kept, and where it is computed twice."""
    settings = {"clients": EACH, "train": {"moments": "keep"}}
    one, several = (
        plain(server={"shared_adapter": True, "count": n, "keep_graphs_mib": mib}, **settings)
        for n, mib in ((1, 512), (count, kept))
    )
    for t in range(3):
        assert several.hashes(t) == one.hashes(t)
        assert several.outcomes[t].validation == one.outcomes[t].validation
        assert several.ledger[t] == one.ledger[t]
    for t in (1, 2):
        same = [r.rounds.load_shared(t, "shared.values") for r in (one, several)]
        assert torch.equal(*same)


def test_a_lost_servers_clients_move_and_come_back(
    tiny_config: Make, play: Play, plain: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three servers answers neither in round 2 nor in round 3."""
    settings = {"clients": EACH, "train": {"rounds": 5, "moments": "keep"}}
    settings |= {"server": {"shared_adapter": True}}
    wanted = plain(**settings)
    at, asked = [0], []

    def ready(pool: InlinePool) -> list[int]:
        everyone = list(range(len(pool.members)))
        return [i for i in everyone if i != 1] if at[0] in (2, 3) else everyone

    sound = TrunkHost.begin

    def begin(self: TrunkHost, run: str, round: int, clients: Sequence[str], *args: Any) -> Lease:
        asked.append((round, self._holder, tuple(clients)))
        return sound(self, run, round, clients, *args)

    monkeypatch.setattr(InlinePool, "ready", ready)
    monkeypatch.setattr(TrunkHost, "begin", begin)

    def note(_: Plant, t: int) -> None:
        at[0] = t

    settings["server"] |= {"count": 3}
    found = play(tiny_config(**settings), before=note)
    for t in range(6):
        assert found.hashes(t) == wanted.hashes(t)
    of_second = {r for r, holder, _ in asked if holder == "trunk-00001"}
    assert of_second == {1, 4, 5}
    moved = "2 of 5 client actors moved to another server: {} of 3 servers answer"
    assert found.events[2] == [moved.format(2)]
    assert found.events[4] == [moved.format(3)]


def test_a_server_without_an_actor_is_refused(tiny_config: Make) -> None:
    config = tiny_config(server={"count": 3}, clients={"per_actor": 3})
    with pytest.raises(FellrayError, match=r"server.count=3.*in 2 actor\(s\).*server.count=2"):
        Plant.inline(config, survey(config), None)  # type: ignore[arg-type]


def test_a_run_learns_something(plain: Play) -> None:
    """The smallest client meets its few histories again and again: its loss falls."""
    train = {"rounds": 5, "learning_rate": 0.02, "moments": "keep"}
    played = plain(train=train, method={"kind": "local"})
    assert played.losses(5)["c4"] < played.losses(1)["c4"] - 0.05


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tiny_config: Make, play: Play, plain: Play
) -> None:
    settings = {"train": {"rounds": 3, "moments": "keep"}, "server": {"shared_adapter": True}}
    whole, broken = plain(**settings), tiny_config(**settings)
    play(broken, last=1)
    rest = play(broken)
    assert len(rest.outcomes) == 2
    for t in range(4):
        assert rest.hashes(t) == whole.hashes(t)
    assert rest.outcomes[0].reports.losses == whole.outcomes[2].reports.losses


def test_moments_are_kept_only_where_asked(plain: Play) -> None:
    reset, keep = (plain(train={"moments": m}) for m in ("reset", "keep"))
    assert reset.hashes(1) == keep.hashes(1)
    assert reset.hashes(2) != keep.hashes(2)
    steps = held(keep, 2, "client.steps")
    assert steps.tolist() == [6] * 5, "three steps in each of two rounds"
    with pytest.raises(FellrayError, match=r"no 'client.steps'"):
        held(reset, 2, "client.steps")


# --- order of arrival (promise 3) ---------------------------------------------------------------


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_any_order_of_arrival_gives_the_same_run(
    order: list[int], tiny_config: Make, play: Play, plain: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors are asked, and train, in another order; the answers stand in their places."""
    server = {"shared_adapter": True}
    wanted = plain(server=server, clients=EACH)

    def shuffled(pool: InlinePool, method: str, *columns: Sequence[Any], **_: Any) -> list[Any]:
        places = order if len(pool.members) == 5 else range(len(pool.members))
        answers: dict[int, Any] = {}
        for i in places:
            answers[i] = getattr(pool.members[i], method)(*(column[i] for column in columns))
        return [answers[i] for i in sorted(answers)]

    monkeypatch.setattr(InlinePool, "map", shuffled)
    found = play(tiny_config(server=server, clients=EACH))
    for t in range(3):
        assert found.hashes(t) == wanted.hashes(t)
    same = [run.rounds.load_shared(2, "shared.values") for run in (wanted, found)]
    assert torch.equal(*same)


# --- what a plant mixes -------------------------------------------------------------------------


def test_a_round_is_fit_plan_reduce_install(plain: Play) -> None:
    """The committed state is `M @ theta` of what was trained, both sides of the cut."""
    played = plain(train={"rounds": 1})
    reports, plan = played.outcomes[1].reports, played.outcomes[1].plan
    mixed = reduce(plan, reports.theta_CP)
    stored = torch.cat([held(played, 1, n) for n in ("client.values", "trunk.values")], dim=1)
    assert torch.equal(stored, mixed)
    assert not torch.equal(mixed, reports.theta_CP)
    assert reports.samples == 5 * 12
    assert reports.meta.samples_C.tolist() == [12.0] * 5


def test_the_gram_is_of_the_rounds_updates(plain: Play) -> None:
    played = plain()
    reports = played.outcomes[2].reports
    names = ("client.values", "trunk.values")
    start = torch.cat([held(played, 1, name) for name in names], dim=1).double()
    update = reports.theta_CP.double() - start
    torch.testing.assert_close(reports.meta.gram["update"], update @ update.T)
    assert list(reports.meta.gram) == ["update"], "the method compares nothing else"


def test_everyone_starts_from_the_same_adapters(plain: Play) -> None:
    played = plain(train={"rounds": 0})
    assert len(set(played.hashes(0).values())) == 1
    other = plain(train={"rounds": 0}, seed=1)
    assert other.hashes(0) != played.hashes(0)


def test_local_training_shares_nothing(plain: Play) -> None:
    """Alone in the world or beside four others: a client of `local` trains to the same bits."""
    played = plain(method={"kind": "local"}, train={"moments": "keep"})
    assert torch.equal(
        torch.cat([held(played, 1, n) for n in ("client.values", "trunk.values")], dim=1),
        played.outcomes[1].reports.theta_CP,
    )
    assert len(set(played.hashes(2).values())) == 5


def test_share_decides_what_is_mixed(tiny_config: Make, play: Play, plain: Play) -> None:
    runs = {
        share: play(tiny_config(train={"share": share, "rounds": 1}, method={"kind": "fedavg"}))
        for share in ("all", "trunk_only", "none")
    }
    local = plain(method={"kind": "local"}, train={"rounds": 1})
    client = {s: held(run, 1, "client.values") for s, run in runs.items()}
    trunk = {s: held(run, 1, "trunk.values") for s, run in runs.items()}
    trained = {n: held(local, 1, n) for n in ("client.values", "trunk.values")}

    def all_equal(rows: Tensor) -> bool:
        return bool((rows == rows[:1]).all())

    assert all_equal(client["all"])
    assert all_equal(trunk["all"])
    assert torch.equal(client["trunk_only"], trained["client.values"])
    assert torch.equal(trunk["trunk_only"], trunk["all"])
    assert torch.equal(client["none"], trained["client.values"])
    assert torch.equal(trunk["none"], trained["trunk.values"])
    width = {s: run.outcomes[1].reports.theta_CP.shape[1] for s, run in runs.items()}
    assert width["none"] == 0
    assert width["trunk_only"] == trunk["all"].shape[1]
    assert width["all"] == client["all"].shape[1] + trunk["all"].shape[1]


def test_share_none_still_plans_for_the_record(plain: Play) -> None:
    played = plain(train={"share": "none"})
    assert played.outcomes[2].plan.mixing_CC.shape == (5, 5)
    assert torch.isfinite(played.outcomes[2].plan.mixing_CC).all()


def test_central_is_one_learner_over_all_data(plain: Play) -> None:
    played = plain(method={"kind": "central"})
    assert list(played.hashes(1)) == ["central"]
    reports = played.outcomes[1].reports
    assert reports.samples == 5 * 12, "as many histories as all clients together"
    data = Dataset(played.config.data.path)
    assert list(played.outcomes[1].validation) == list(data.clients), "scored client by client"


# --- refusals -----------------------------------------------------------------------------------


def poison(plant: Plant, *learners: str) -> None:
    """From here on these learners' scores are NaN: loss, gradients and adapters follow."""
    for client in clients_of(plant):
        for desk in client._crews._sit(client.learners):
            for place, shard in enumerate(desk.reader.shards):
                if shard.client in learners:
                    desk.scorer.prior_KI[place] = torch.nan


def heal(plant: Plant) -> None:
    for client in clients_of(plant):
        for desk in client._crews._sit(client.learners):
            desk.scorer.prior_KI.nan_to_num_(0.0)


def poisoned(*learners: str, round: int) -> Callable[[Plant, int], None]:
    def before(plant: Plant, t: int) -> None:
        if t == round:
            poison(plant, *learners)

    return before


@pytest.mark.parametrize(
    ("share", "per_actor"), [("all", 1), ("all", 5), ("trunk_only", 5), ("none", 5)]
)
def test_a_poisoned_client_is_refused_and_keeps_its_rounds_start(
    share: str, per_actor: int, tiny_config: Make, play: Play, plain: Play
) -> None:
    settings = {
        "train": {"share": share, "moments": "keep"},
        "clients": {"per_actor": per_actor},
        "server": {"shared_adapter": True},
        "evaluation": {"every": 9},  # NaN scores cannot be ranked
    }
    local = {"method": {"kind": "local"}, **settings}
    clean = plain(last=1, **local)
    sick = play(tiny_config(**local), before=poisoned("c2", round=1), last=1)
    reports = sick.outcomes[1].reports
    assert list(reports.refused) == ["c2"]
    assert reports.meta.clients == ("c0", "c1", "c3", "c4")
    assert torch.isfinite(reports.theta_CP).all()
    (event,) = sick.events[1]
    assert event.startswith("round 1: c2 refused: training loss is nan")
    kinds = [f"{p}.{k}" for p in ("client", "trunk") for k in ("values", "moment1", "steps")]
    for name in kinds:
        start, end, wanted = held(sick, 0, name), held(sick, 1, name), held(clean, 1, name)
        assert torch.equal(end[2], start[2]), name
        others = [0, 1, 3, 4]
        assert torch.equal(end[others], wanted[others]), (name, "nobody else's bits")
    assert torch.isfinite(sick.rounds.load_shared(1, "shared.values")).all()


def test_the_mixture_is_of_those_accepted(tiny_config: Make, play: Play) -> None:
    settings = {"evaluation": {"every": 9}, "clients": {"per_actor": 2}}
    sick = play(tiny_config(**settings), before=poisoned("c0", "c3", round=1), last=1)
    reports, plan = sick.outcomes[1].reports, sick.outcomes[1].plan
    assert reports.meta.clients == ("c1", "c2", "c4")
    assert plan.mixing_CC.shape == (3, 3)
    end = torch.cat([held(sick, 1, n) for n in ("client.values", "trunk.values")], dim=1)
    start = torch.cat([held(sick, 0, n) for n in ("client.values", "trunk.values")], dim=1)
    assert torch.equal(end[[1, 2, 4]], reduce(plan, reports.theta_CP))
    assert torch.equal(end[[0, 3]], start[[0, 3]])
    assert sorted(reports.losses) == ["c0", "c1", "c2", "c3", "c4"], "all are told"


def test_everyone_refused_is_a_round_in_which_nothing_happened(
    tiny_config: Make, play: Play
) -> None:
    for method in ({"kind": "fellrec"}, {"kind": "fedavg", "weighting": "samples"}):
        settings = {
            "method": method,
            "server": {"shared_adapter": True},
            "evaluation": {"every": 9},
        }
        everyone = ("c0", "c1", "c2", "c3", "c4")
        sick = play(tiny_config(**settings), before=poisoned(*everyone, round=1), last=1)
        assert sick.hashes(1) == sick.hashes(0)
        assert sorted(sick.outcomes[1].reports.refused) == list(everyone)
        shared = [sick.rounds.load_shared(t, "shared.values") for t in (0, 1)]
        assert torch.equal(*shared)
        assert len(sick.events[1]) == 5


def test_a_refused_client_comes_back(tiny_config: Make, play: Play) -> None:
    def before(plant: Plant, t: int) -> None:
        poison(plant, "c1") if t == 1 else heal(plant)

    played = play(tiny_config(evaluation={"every": 9}), before=before, last=2)
    assert list(played.outcomes[1].reports.refused) == ["c1"]
    assert played.outcomes[2].reports.refused == {}
    assert played.hashes(2)["c1"] != played.hashes(1)["c1"]


@pytest.mark.parametrize("share", ["all", "trunk_only", "none"])
def test_a_poisoned_trunk_is_refused_too(
    share: str, tiny_config: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's side is sound; what the last step made of its trunk adapter is not."""
    sound = TrunkHost.backward

    def spoilt(self: TrunkHost, sent: Sequence[tuple[Activation, Gradient]]) -> Any:
        answers = sound(self, sent)
        for activation, _ in sent:
            if "c3" in activation.clients and activation.step == 2:
                self._slots._trained["c3"]["values"][7] = torch.inf
        return answers

    monkeypatch.setattr(TrunkHost, "backward", spoilt)
    config = tiny_config(train={"share": share}, evaluation={"every": 9})
    played = play(config, last=1)
    assert dict(played.outcomes[1].reports.refused) == {
        "c3": "the trunk's update holds a NaN or an infinity"
    }
    for name in ("client.values", "trunk.values"):
        assert torch.equal(held(played, 1, name)[3], held(played, 0, name)[3])


# --- a round begun again ------------------------------------------------------------------------


def restart_server(plant: Plant) -> None:
    """A new life under the same handle, as Ray gives it."""
    config = plant._config
    fresh = make_host(config, plant._learners, survey(config).trunk_side(config), plant._rounds)
    plant._servers.pool.members[0] = fresh  # type: ignore[attr-defined]
    for client in clients_of(plant):
        client._span.remote._hosts = (fresh,)
        client._span.remote._host = fresh


def restart_client(plant: Plant) -> None:
    config, old = plant._config, clients_of(plant)[1]
    world = survey(config)
    fresh = plants.Client(
        config,
        1,
        {c: world.seats[c] for c in old.learners},
        world.client_side(config),
        world.catalogue,
        old._span.remote,
        plant._rounds,
    )
    plant._clients.members[1] = fresh  # type: ignore[attr-defined]


LOSSES = [
    (restart_server, "install", "all"),
    pytest.param(restart_server, "install", "none", marks=pytest.mark.long),
    (restart_server, "validate", "all"),
    pytest.param(restart_client, "install", "all", marks=pytest.mark.long),
    (restart_client, "validate", "none"),
]


@pytest.mark.parametrize(("restart", "before", "share"), LOSSES)
def test_whoever_is_lost_whenever_the_round_is_replayed_to_the_same_bits(
    restart: Callable[[Plant], None],
    before: str,
    share: str,
    tiny_config: Make,
    play: Play,
    plain: Play,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In round 2 a holder dies after training, before it installs or before it is validated."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    settings = {
        "train": {"share": share, "moments": "keep"},
        "server": {"shared_adapter": True},
        "clients": {"per_actor": 2},
    }
    wanted = plain(**settings)
    sound, lives = getattr(Plant, before), [1]

    def strike(plant: Plant, *args: Any) -> Any:
        t = args[0].meta.round if before == "install" else args[0]
        if t == 2 and lives:
            lives.clear()
            restart(plant)
        return sound(plant, *args)

    monkeypatch.setattr(Plant, before, strike)
    found = play(tiny_config(**settings))
    assert not lives
    for t in range(3):
        assert found.hashes(t) == wanted.hashes(t)
        assert found.outcomes[t].validation == wanted.outcomes[t].validation
    same = [r.rounds.load_shared(2, "shared.values") for r in (wanted, found)]
    assert torch.equal(*same)


def test_a_server_lost_while_clients_train_replays_the_round_to_the_same_bits(
    tiny_config: Make, play: Play, plain: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clients had finished; what the server held of them is gone."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    wanted = plain(server={"shared_adapter": True}, clients=EACH)
    begin, lives, plant = TrunkHost.begin, [1], []

    def strike(self: TrunkHost, run: str, round: int, clients: Sequence[str], *args: Any) -> Lease:
        if lives and round == 2 and "c2" in clients:
            lives.clear()
            restart_server(plant[0])
            return begin(host_of(plant[0]), run, round, clients, *args)
        return begin(self, run, round, clients, *args)

    monkeypatch.setattr(TrunkHost, "begin", strike)
    found = play(
        tiny_config(server={"shared_adapter": True}, clients=EACH),
        before=lambda p, t: plant.append(p),
    )
    assert not lives
    for t in range(3):
        assert found.hashes(t) == wanted.hashes(t)
    assert found.events[2] == [
        "the round was begun again: the server was restarted during the round"
    ]
    repeated = {r.kind: r.bytes for r in found.ledger[2] if r.client == "c0"}
    once = {r.kind: r.bytes for r in wanted.ledger[2] if r.client == "c0"}
    assert repeated.pop("replayed") > 0
    assert repeated == once


def test_a_round_that_is_lost_again_and_again_ends_the_run(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    config = tiny_config()

    def hopeless(plant: Plant) -> None:
        raise StaleLease("gone")

    with (
        Plant.inline(config, survey(config), Rounds(Storage(config.storage))) as plant,
        pytest.raises(FellrayError, match=r"gone.*`fellray train` resumes the run"),
    ):
        plant.replayed(hopeless)
    assert len(pauses) == TRIES - 1
    assert pauses == sorted(pauses)


# --- what is sent (promise 6) -------------------------------------------------------------------


class Tape:
    """Everything that passed between client actors and the rest, in order."""

    def __init__(self) -> None:
        self.crossed: list[tuple[str, Any]] = []

    def blob(self) -> bytes:
        return b"".join(pickle.dumps(message) for _, message in self.crossed)

    def of(self, *kinds: type) -> list[Any]:
        return [message for _, message in self.crossed if isinstance(message, kinds)]


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    """Records at both doors of a client actor: its `Remote`, and the pool that asks it."""
    found = Tape()

    class Recorder(InProcess):
        last: "Recorder"

        def __init__(self, host: TrunkHost):
            super().__init__(host)
            Recorder.last = self
            found.remote = self  # type: ignore[attr-defined]

        def begin(
            self, run: str, round: int, clients: tuple[str, ...], twin: bool = False
        ) -> Callable[[], Lease]:
            leave = super().begin(run, round, clients, twin)
            found.crossed += [("begin", (run, round, clients)), ("lease", leave())]
            return leave

        def forward(self, activation: Activation) -> Answer:
            answer = super().forward(activation)
            found.crossed += [("forward", activation), ("output", answer().copy())]
            return answer

        def backward(self, activation: Activation, gradient: Gradient) -> Answer:
            answer = super().backward(activation, gradient)
            found.crossed += [
                ("backward", activation),
                ("backward", gradient),
                ("input gradient", answer().copy()),
            ]
            return answer

    sound = InlinePool.map

    def recorded(pool: InlinePool, method: str, *columns: Sequence[Any], **few: Any) -> list[Any]:
        answers = sound(pool, method, *columns, **few)
        if not isinstance(pool.members[0], TrunkHost):
            found.crossed += [(method, item) for column in columns for item in column]
            # as bytes at once: later rounds write into the same memory
            found.crossed += [(method, pickle.loads(pickle.dumps(a))) for a in answers]
        return answers

    monkeypatch.setattr(plants, "InProcess", Recorder)
    monkeypatch.setattr(InlinePool, "map", recorded)
    return found


def walk(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    """Every leaf of a message with the path to it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from walk(getattr(value, f.name), f"{type(value).__name__}.{f.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, f"{path}[{key!r}]" if isinstance(key, int) else path)
    elif isinstance(value, tuple | list | set):
        for item in value:
            yield from walk(item, path)
    else:
        yield path, value


# where numbers may stand that are neither hidden states nor adapters
ARRAYS = {
    "Activation.row_client_N",
    "Activation.lengths_N",
    "Activation.h_Ld",
    "Gradient.g_Ld",
    "output",
    "input gradient",
    "Update.theta_SP",
    "Installation.theta_SP",
}
TYPES = (Activation, Gradient, Lease, LedgerRow, Update, Installation, Score)


def forms(numbers: np.ndarray) -> list[bytes]:
    """A row of small integers as it might lie in a message; too short a one tells nothing."""
    if len(numbers) < 4:
        return []
    kinds = (np.int16, np.int32, np.int64, np.float32, np.float64)
    listed = pickle.dumps(numbers.tolist())
    return [numbers.astype(kind).tobytes() for kind in kinds] + [listed[14:-2]]


def secrets(config: RunConfig) -> dict[str, list[bytes]]:
    """What must not be sent, as bytes: every title, every token row and target of the run."""
    config = config.model_copy(update={"clients": config.clients.model_copy(update={"crews": 1})})
    world = survey(config)
    data = Dataset(config.data.path)
    client = plants.Client(
        config,
        0,
        world.seats,
        world.client_side(config),
        world.catalogue,
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
    )
    found: dict[str, list[bytes]] = {"titles": [title.encode() for title in data.titles]}
    found["tokens"], found["targets"], found["histories"] = [], [], []
    (desk,) = client._crews._sit(client.learners)
    reader = desk.reader
    batches = [(b, t) for r in (1, 2) for b, t in reader.steps(r)]
    for batch, target_N in batches:
        pieces = batch.ids_L.split(batch.rows.lengths_N.tolist())
        for row in pieces:
            if len(row) >= 8:
                found["tokens"] += forms(row[:8].numpy())
        for slot in range(5):
            found["targets"] += forms(target_N[batch.slot_N == slot].numpy())
    for batch, _, truth in reader.held_out(1, 5):
        found["targets"] += forms(np.concatenate(truth)[:6])
        for row in batch.ids_L.split(batch.rows.lengths_N.tolist()):
            if len(row) >= 8:
                found["tokens"] += forms(row[:8].numpy())
    for shard in reader.shards:
        found["histories"] += [p for at in (0, 6) for p in forms(shard.items[at : at + 6])]
    return found


def test_the_search_would_find_what_it_looks_for(tiny_config: Make) -> None:
    for needles in secrets(tiny_config()).values():
        assert min(map(len, needles)) >= 6
        assert all(needle in pickle.dumps([needle, 1]) for needle in needles[:50])
    ids = np.array([5, 61, 7, 9, 22, 31, 6, 48])
    for message in (ids, ids.astype(np.int32), ids.tolist(), tuple(ids.tolist())):
        assert any(needle in pickle.dumps(message) for needle in forms(ids)), message


@pytest.mark.parametrize(
    ("share", "per_actor"), [("all", 1), ("all", 5), ("trunk_only", 5), ("none", 1)]
)
def test_nothing_private_leaves(
    share: str, per_actor: int, tape: Tape, tiny_config: Make, play: Play
) -> None:
    config = tiny_config(train={"share": share}, clients={"per_actor": per_actor})
    blocks: list[Tensor] = []
    members: list[Any] = []

    def before(plant: Plant, t: int) -> None:
        members[:] = clients_of(plant)

    # the clients' side after every training and after every installation
    sound = plants.Client.fit

    def fit(self: Any, round: int, clients: Sequence[str], *more: Any) -> Update:
        update = sound(self, round, clients, *more)
        blocks.append(self._slots.bank.values_SP.clone())
        return update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plants.Client, "fit", fit)
        play(config, before=before)
    blocks += [member._slots.bank.values_SP.clone() for member in members]

    assert len(tape.of(Activation)) > 10
    assert len(tape.of(Update)) == 2 * len(members)
    leaves = [leaf for kind, message in tape.crossed for leaf in walk(message, kind)]
    arrays = {path for path, value in leaves if isinstance(value, np.ndarray)}
    assert arrays <= ARRAYS
    assert {path for path, value in leaves if isinstance(value, torch.Tensor)} == set()
    for activation in tape.of(Activation):
        owners, lengths = activation.row_client_N, activation.lengths_N
        assert set(owners.tolist()) <= set(range(len(activation.clients)))
        assert lengths.sum() == len(activation.h_Ld)
        assert activation.h_Ld.dtype == np.float32
        assert activation.h_Ld.shape[1] == 32

    blob = tape.blob()
    for name, needles in secrets(config).items():
        assert [needle for needle in needles if needle in blob] == [], name

    # 16 numbers of a client's row, taken where training has moved them
    pieces = [row[at : at + 16].numpy().tobytes() for b in blocks for row in b for at in (0, 64)]
    sent = [piece for piece in pieces if piece in blob]
    if share == "all":
        assert len(sent) > 0.4 * len(pieces), "the search finds what is sent"
    else:
        assert sent == []
        assert all(u.theta_SP.shape[1] == 0 for u in tape.of(Update))
        assert all(i.theta_SP.shape[1] == 0 for i in tape.of(Installation))


def test_what_answers_a_call_is_of_a_closed_type(tape: Tape, tiny_config: Make, play: Play) -> None:
    played = play(tiny_config())
    assert played
    plain = (int, float, str, bytes, type(None), tuple, list, dict, np.ndarray)
    staged = plants.Staged
    for kind, message in tape.crossed:
        items = message if isinstance(message, tuple | list) else [message]
        values = [v for i in items for v in (i.values() if isinstance(i, dict) else [i])]
        assert all(isinstance(v, (*TYPES, staged, *plain)) for v in values), kind


@pytest.mark.parametrize(("share", "per_actor"), [("all", 1), ("all", 2), ("none", 5)])
def test_the_ledger_is_what_the_transport_carried(
    per_actor: int, share: str, tape: Tape, tiny_config: Make, play: Play
) -> None:
    config = tiny_config(train={"share": share}, clients={"per_actor": per_actor})
    played = play(config)
    entered = total(row for page in played.ledger for row in page)

    carried: dict[str, int] = {}

    def count(kind: str, array: np.ndarray) -> None:
        carried[kind] = carried.get(kind, 0) + array.nbytes

    evaluating = False
    for kind, message in tape.crossed:
        if isinstance(message, Activation):
            evaluating = message.lease is None
            name = "activation" if kind == "forward" else "activation_repeat"
            count("evaluation_activation" if evaluating else name, message.h_Ld)
            count("envelope", message.row_client_N)
            count("envelope", message.lengths_N)
        elif isinstance(message, Gradient):
            count("gradient", message.g_Ld)
        elif kind == "output":
            count("evaluation_output" if evaluating else "output", message)
        elif kind == "input gradient":
            count("input_gradient", message)
        elif isinstance(message, Update):
            count("adapter_up", message.theta_SP)
            count("loss", np.array(message.losses))
        elif isinstance(message, Installation):
            count("adapter_down", message.theta_SP)
    if share != "all":
        assert carried.pop("adapter_down") == 0
        assert entered.get("adapter_up") == 0
    assert entered == carried
    across = sum(
        size for kind, size in entered.items() if kind not in ("adapter_up", "adapter_down", "loss")
    )
    assert across == tape.remote.bytes  # type: ignore[attr-defined]


# --- evaluation ---------------------------------------------------------------------------------


def test_validation_is_due_every_so_often_and_at_the_end(plain: Play) -> None:
    played = plain(train={"rounds": 3}, evaluation={"every": 2})
    assert [o.validation is not None for o in played.outcomes] == [True, False, True, True]


def test_scores_are_of_the_round_that_was_asked_for(plain: Play) -> None:
    played = plain(clients={"per_actor": 2})
    config = played.config
    with Plant.inline(config, survey(config), played.rounds) as plant:
        for t in (2, 0, 1):
            assert (
                plant.evaluate(t, 1, config.evaluation.max_users) == played.outcomes[t].validation
            )
        baselines = plant.evaluate_baselines(2)
        assert list(baselines) == ["popularity", "prior"]
        assert list(baselines["prior"]) == ["c0", "c1", "c2", "c3", "c4"]


def test_reports_are_rows_in_the_order_of_clients(plain: Play) -> None:
    reports = plain(last=1, clients={"per_actor": 2}).outcomes[1].reports
    assert isinstance(reports, Reports)
    assert reports.meta.clients == ("c0", "c1", "c2", "c3", "c4")
    assert reports.meta.losses_C.tolist() == [reports.losses[c] for c in reports.meta.clients]
