"""The trunk's host: whoever shares a batch never changes your bits; leases; both engines.

Run as a script it compares the engines in a process of its own (DeepSpeed changes its process).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fellray.platform.config import RunConfig, parse
from fellray.platform.encoder import MINILM, load_backbone
from fellray.platform.errors import FellrayError
from fellray.platform.host import TrunkHost
from fellray.platform.in_process import InProcess
from fellray.platform.messages import Activation, Gradient, Installation, Lease, StaleLease
from fellray.platform.rounds import Rounds
from fellray.platform.split import cut_model
from fellray.platform.storage import Storage
from fellray.platform.trunk import Engine, TorchEngine, Trunk, build_trunk, mean_gradient

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ("a", "b", "c", "d")
Sent = tuple[Activation, Gradient]


def make_config(name: str, **more: Any) -> RunConfig:
    tree = {
        "name": "run",
        "model": {"name": name, "cut": 1, "top": 1, "lora": {"r": 2}},
        "train": {"learning_rate": 0.01, **more.pop("train", {})},
        "server": {"engine": "torch", "shared_adapter": False, **more.pop("server", {})},
    }
    assert not more
    return parse(tree, "test")


def make_host(config: RunConfig, folder: Path, engine: type[Any] = TorchEngine) -> TrunkHost:
    """A host over the rounds in a folder; a new folder gets a round 0, adapters drawn at random."""
    parts = cut_model(load_backbone(config.model.name), config.model)
    sites = parts.cut.sites["trunk"]
    width = sum(site.num_parameters(config.model.lora.r) for site in sites)
    rounds = Rounds(Storage(str(folder)))
    if rounds.latest() is None:
        commit_start(rounds, config, width)
    dtype = getattr(torch, config.server.dtype)
    running: Engine = engine(Trunk(parts.trunk, torch.zeros(width), dtype), config)
    host = TrunkHost(config, CLIENTS, sites, running, rounds)
    host.begin("run", 1, ())  # stand at round 0
    return host


def commit_start(rounds: Rounds, config: RunConfig, width: int) -> None:
    draw = torch.Generator().manual_seed(1)
    values, shared = (torch.empty(n, width).normal_(0, 0.1, generator=draw) for n in (4, 1))
    personal = {"values": values, "moment1": values * 0, "moment2": values * 0}
    personal["steps"] = torch.zeros(4, dtype=torch.int64)
    common = {"values": shared[0], "moment1": shared[0] * 0, "moment2": shared[0] * 0}
    common["steps"] = torch.tensor(0.0)
    staged = [
        rounds.stage(0, "trunk", CLIENTS, {f"trunk.{k}": t for k, t in personal.items()}),
        rounds.stage(0, "shared", (), {f"shared.{k}": t for k, t in common.items()}),
    ]
    rounds.commit(0, staged, {})


def message(
    client: str | Sequence[str],
    lease: Lease | None,
    step: int,
    lengths: Sequence[int],
    seed: int,
    width: int = 32,
    round: int = 1,
) -> Sent:
    """One step of a client, or of an actor's clients with the same number of rows each."""
    clients = (client,) if isinstance(client, str) else tuple(client)
    draw = np.random.default_rng([seed, step])
    tokens = sum(lengths)
    h = draw.standard_normal((tokens, width), dtype=np.float32)
    g = draw.standard_normal((tokens, width), dtype=np.float32) * 0.1
    owner = np.repeat(np.arange(len(clients)), len(lengths) // len(clients))
    activation = Activation(
        "run", round, step, lease, clients, owner.astype(np.int32), np.array(lengths, np.int32), h
    )
    return activation, Gradient("run", round, step, g)


def theta(host: TrunkHost, clients: Sequence[str]) -> np.ndarray:
    """Trunk adapters [C, P] as they stand; of those who have no slot, as committed."""
    absent = [c for c in clients if c not in host._slots._slot]
    host._slots.hold(host._rounds.latest() or 0, absent)
    return host.report([], clients, True)[1].copy()


def common(host: TrunkHost, clients: Sequence[str]) -> Tensor:
    """Their shares of the common gradient [C, P]."""
    theta(host, clients)
    host._shared.fit(len(host._slots.bank.values_SP))
    return host._shared.gradient.total_SP[host._merger.find(clients)]


def bits(*tensors: Tensor | np.ndarray) -> list[bytes]:
    return [np.asarray(tensor).tobytes() for tensor in tensors]


def answered(answers: Sequence[np.ndarray | Exception]) -> list[np.ndarray]:
    for answer in answers:
        assert not isinstance(answer, Exception), answer
    return [answer for answer in answers if isinstance(answer, np.ndarray)]


# --- alone or among strangers (promise 4) -------------------------------------------------------


def my_steps(seed: int, steps: int) -> list[list[int]]:
    """Row lengths of my steps: one or two rows."""
    draw = np.random.default_rng(seed)
    return [draw.integers(2, 40, draw.integers(1, 3)).tolist() for _ in range(steps)]


def train_one(
    host: TrunkHost, steps: list[list[int]], strangers: np.random.Generator | None
) -> list[bytes]:
    """Everything `b` ever sees, and its adapter at the end."""
    me = host.begin("run", 1, ["b"])
    others = {c: host.begin("run", 1, [c]) for c in CLIENTS if c != "b"}
    at = dict.fromkeys(others, 0)
    seen = []
    for step, lengths in enumerate(steps):
        batch = {"b": message("b", me, step, lengths, seed=100, width=384)}
        if strangers is not None:
            for other in strangers.permutation(list(others))[: strangers.integers(0, 4)].tolist():
                sizes = strangers.integers(1, 49, strangers.integers(1, 3)).tolist()
                seed = int(strangers.integers(1_000))
                batch[other] = message(other, others[other], at[other], sizes, seed, 384)
                at[other] += 1
            batch = {name: batch[name] for name in strangers.permutation(list(batch)).tolist()}
        mine = list(batch).index("b")
        ups = answered(host.forward([activation for activation, _ in batch.values()]))
        downs = answered(host.backward(list(batch.values())))
        seen += bits(ups[mine], downs[mine])
    if strangers is not None:
        assert min(at.values()) > 0, "nobody was there"
    row = CLIENTS.index("b")
    return [*seen, *bits(theta(host, ["b"]), common(host, [CLIENTS[row]]))]


@pytest.fixture(scope="module")
def wide_hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, TrunkHost]:
    """MiniLM's real weights, four of six blocks; with and without an adapter shared by all."""
    return {
        shared: make_host(
            make_config(MINILM, server={"shared_adapter": shared}), tmp_path_factory.mktemp("wide")
        )
        for shared in (False, True)
    }


def check_strangers(host: TrunkHost, steps: list[list[int]], seeds: Sequence[int]) -> None:
    host.begin("run", 1, CLIENTS)
    alone = train_one(host, steps, None)
    assert len(set(alone)) == len(alone) or not host._shared.there
    for seed in seeds:
        among = train_one(host, steps, np.random.default_rng(seed))
        differ = [at for at, (x, y) in enumerate(zip(alone, among, strict=True)) if x != y]
        assert differ == [], f"seed {seed}: of {len(alone)} records these differ"


@pytest.mark.parametrize(
    ("threads", "shared"),
    [pytest.param(1, False, marks=pytest.mark.long), (2, False), (1, True)],
)
def test_alone_or_among_strangers(
    wide_hosts: dict[bool, TrunkHost], threads: int, shared: bool
) -> None:
    """20 steps: activations, input gradients, personal adapter, share of the common gradient."""
    torch.set_num_threads(threads)
    check_strangers(wide_hosts[shared], my_steps(7, 20), seeds=[0])


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_alone_or_among_many_strangers(
    wide_hosts: dict[bool, TrunkHost], threads: int, shared: bool, seed: int
) -> None:
    torch.set_num_threads(threads)
    check_strangers(wide_hosts[shared], my_steps(seed, 20), seeds=range(10 * seed, 10 * seed + 4))


def train_all(
    host: TrunkHost, steps: int, draw: np.random.Generator | None
) -> dict[str, list[bytes]]:
    """Everything each client sees, and its adapter; in random company, forward and backward each
    in another, or alone."""
    seen: dict[str, list[bytes]] = {client: [] for client in CLIENTS}
    leases = {client: host.begin("run", 1, [client]) for client in CLIENTS}
    for step in range(steps):
        sizes = np.random.default_rng([5, step]).integers(1, 40, (len(CLIENTS), 2)).tolist()
        sent = {
            c: message(c, leases[c], step, size, seed=100 + i, width=384)
            for i, (c, size) in enumerate(zip(CLIENTS, sizes, strict=True))
        }
        for run in ("forward", "backward"):
            for group in deal(draw):
                asked = [sent[c][0] if run == "forward" else sent[c] for c in group]
                for c, answer in zip(group, answered(getattr(host, run)(asked)), strict=True):
                    seen[c] += bits(answer)
    for client in CLIENTS:
        seen[client] += bits(host.report([], [client], True)[1])
    return seen


HOUR = (pytest.mark.long, pytest.mark.timeout(3600))


def deal(draw: np.random.Generator | None) -> list[list[str]]:
    """The clients in random groups, or each alone."""
    if draw is None:
        return [[client] for client in CLIENTS]
    groups = draw.integers(0, len(CLIENTS), len(CLIENTS))
    order = draw.permutation(len(CLIENTS)).tolist()
    dealt = [[CLIENTS[i] for i in order if groups[i] == g] for g in range(len(CLIENTS))]
    return [group for group in dealt if group]


@pytest.mark.parametrize(
    ("groupings", "kept_mib"),
    [
        (1, 0),
        pytest.param(2, 1, marks=pytest.mark.long),
        pytest.param(256, 1, marks=HOUR),
        pytest.param(256, 512, marks=HOUR),
    ],
)
def test_random_groupings(groupings: int, kept_mib: int, tmp_path: Path) -> None:
    """MiniLM's weights, 20 steps: no mismatch, kept or computed twice; 1 MiB keeps some passes."""
    torch.set_num_threads(2)
    tree = make_config(MINILM, server={"keep_graphs_mib": 0}).model_dump(mode="json")
    tree["model"] |= {"cut": 4}
    wanted = train_all(make_host(parse(tree, "test"), tmp_path), 20, None)
    tree["server"] |= {"keep_graphs_mib": kept_mib}
    host = make_host(parse(tree, "test"), tmp_path)
    mismatches = 0
    for seed in range(groupings):
        found = train_all(host, 20, np.random.default_rng(seed))
        mismatches += sum(found[client] != wanted[client] for client in CLIENTS)
    assert mismatches == 0
    assert host._keep.used <= kept_mib * 2**20


def test_packed_with_others_or_in_messages_of_ones_own(tiny_encoder: Path, tmp_path: Path) -> None:
    """Four clients of one actor, or four actors: the same bits."""
    config = make_config(str(tiny_encoder), server={"shared_adapter": True})
    sizes = {"a": [3, 20], "b": [17, 5], "c": [40, 40], "d": [9, 1]}
    results = []
    for packed in (True, False):
        host = make_host(config, tmp_path)
        leases = {c: host.begin("run", 1, [c]) for c in CLIENTS}
        if packed:
            leases = dict.fromkeys(CLIENTS, host.begin("run", 1, CLIENTS))
        for step in range(3):
            single = [message(c, leases[c], step, sizes[c], seed) for seed, c in enumerate(sizes)]
            if packed:
                a, g = [s[0] for s in single], [s[1] for s in single]
                joined = (
                    replace(
                        a[0],
                        clients=CLIENTS,
                        row_client_N=np.repeat(np.arange(4, dtype=np.int32), 2),
                        lengths_N=np.concatenate([m.lengths_N for m in a]),
                        h_Ld=np.concatenate([m.h_Ld for m in a]),
                    ),
                    replace(g[0], g_Ld=np.concatenate([m.g_Ld for m in g])),
                )
                single = [joined]
            down = np.concatenate(answered(host.backward(single[::-1]))[::-1])
        results.append(bits(down, theta(host, CLIENTS), common(host, CLIENTS)))
    assert results[0] == results[1]


def test_a_nan_stays_with_its_sender(tiny_encoder: Path, tmp_path: Path) -> None:
    config = make_config(str(tiny_encoder), server={"shared_adapter": True})
    found = []
    for poisoned in (False, True):
        host = make_host(config, tmp_path)
        leases = {c: host.begin("run", 1, [c]) for c in ("a", "b")}
        for step in range(2):
            bad = message("a", leases["a"], step, [20, 30], seed=0)
            if poisoned:
                bad[0].h_Ld[3, 1] = np.nan
                bad[1].g_Ld[25, 0] = np.inf
            good = message("b", leases["b"], step, [20, 7], seed=1)
            up = answered(host.forward([bad[0], good[0]]))[1]
            down = answered(host.backward([bad, good]))[1]
        found.append(bits(up, down, theta(host, ["b"]), common(host, [CLIENTS[1]])))
        assert np.isfinite(theta(host, ["a"])).all() != poisoned
    assert found[0] == found[1]


# --- forward and backward -----------------------------------------------------------------------


def test_evaluation_steps_nothing_and_wants_no_lease(tiny_encoder: Path, tmp_path: Path) -> None:
    host = make_host(make_config(str(tiny_encoder)), tmp_path)
    before = bits(theta(host, CLIENTS))
    activation, _ = message("a", None, 0, [5, 20], seed=0, round=0)
    one, two = answered(host.forward([activation, activation]))
    assert bits(one) == bits(two)
    assert bits(theta(host, CLIENTS)) == before
    training = replace(activation, round=1, lease=host.begin("run", 1, ["a"]))
    assert bits(*answered(host.forward([training]))) == bits(one)


def test_evaluation_sees_the_committed_state_and_not_training(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    host = make_host(make_config(str(tiny_encoder)), tmp_path)
    asked, _ = message("a", None, 0, [5, 20], seed=0, round=0)
    committed = bits(*answered(host.forward([asked])))
    lease = host.begin("run", 1, ["a"])
    answered(host.backward([message("a", lease, 0, [5], seed=0)]))
    (answer,) = host.forward([asked])
    assert isinstance(answer, Exception) or bits(answer) == committed


def test_evaluations_of_two_rounds_in_one_batch_get_each_its_own(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    host, rounds = open_host(make_config(str(tiny_encoder)), tmp_path)
    play(host, rounds, 1, 1)
    asked = [message("a", None, 0, [5, 20], seed=0, round=r)[0] for r in (0, 1)]
    alone = [bits(*answered(host.forward([one]))) for one in asked]
    assert alone[0] != alone[1]
    together = [bits(one) for one in answered(host.forward(asked))]
    assert together == alone


def test_an_absent_client_keeps_every_byte(tiny_encoder: Path, tmp_path: Path) -> None:
    """Promise 5, at the server."""
    host = make_host(make_config(str(tiny_encoder), train={"weight_decay": 0.1}), tmp_path)
    before = theta(host, CLIENTS)
    lease = host.begin("run", 1, CLIENTS)
    for step in range(3):
        answered(host.backward([message(("a", "c"), lease, step, [5, 20], seed=0)]))
    after = theta(host, CLIENTS)
    moved = [c for i, c in enumerate(CLIENTS) if bits(after[i]) != bits(before[i])]
    assert moved == ["a", "c"]


def test_the_transport_counts_what_it_carries(tiny_encoder: Path, tmp_path: Path) -> None:
    remote = InProcess(make_host(make_config(str(tiny_encoder)), tmp_path))
    activation, gradient = message("a", remote.begin("run", 1, ("a",))(), 0, [5, 20], seed=0)
    remote.forward(activation)
    envelope, packed = 2 * 2 * 4, 25 * 32 * 4
    assert remote.bytes == envelope + 2 * packed
    remote.backward(activation, gradient)
    assert remote.bytes == 2 * envelope + 5 * packed


# --- leases -------------------------------------------------------------------------------------


def test_another_runs_message_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    host = make_host(make_config(str(tiny_encoder)), tmp_path)
    sent = message("a", host.begin("run", 1, ["a"]), 0, [5], seed=0)
    (answer,) = host.forward([replace(sent[0], run="other")])
    assert isinstance(answer, FellrayError)
    assert str(answer) == "server of run run was asked by other"


REFUSALS = [
    "stale lease",
    "stale lease, step due",
    "another life",
    "repeated step",
    "step left out",
    "gradient of another step",
    "gradient of another round",
    "another run",
    "somebody else's lease",
]


def refusals(host: TrunkHost) -> dict[str, Sent]:
    """Messages of client `a` that must not be run; `host` is at step 1 of its second lease."""
    stale = host.begin("run", 1, ["a"])
    lease = host.begin("run", 1, ["a"])
    answered(host.backward([message("a", lease, 0, [5], seed=0)]))
    due = message("a", lease, 1, [5], seed=0)
    return {
        "stale lease": message("a", stale, 0, [5], seed=0),
        "stale lease, step due": message("a", stale, 1, [5], seed=0),
        "another life": message("a", replace(lease, server="before"), 1, [5], seed=0),
        "repeated step": message("a", lease, 0, [5], seed=0),
        "step left out": message("a", lease, 2, [5], seed=0),
        "gradient of another step": (due[0], replace(due[1], step=0)),
        "gradient of another round": (due[0], replace(due[1], round=2)),
        "another run": (replace(due[0], run="other"), replace(due[1], run="other")),
        "somebody else's lease": message(("a", "c"), lease, 1, [5, 5], seed=0),
    }


@pytest.mark.parametrize("why", REFUSALS)
def test_a_refusal_reaches_its_sender_and_changes_nobody(
    why: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    config = make_config(str(tiny_encoder), server={"shared_adapter": True})
    found = []
    for with_bad in (False, True):
        host = make_host(config, tmp_path)
        bad = refusals(host)[why]
        before = bits(theta(host, ["a", "c"]))
        good = message("b", host.begin("run", 1, ["b"]), 0, [5, 20], seed=1)
        answers = host.backward([bad, good] if with_bad else [good])
        if with_bad:
            wanted = FellrayError if why == "another run" else StaleLease
            assert isinstance(answers[0], wanted)
        assert bits(theta(host, ["a", "c"])) == before
        found.append(bits(*answered(answers[-1:]), theta(host, CLIENTS), common(host, CLIENTS)))
    assert found[0] == found[1]


def test_a_stale_forward_is_refused_too(tiny_encoder: Path, tmp_path: Path) -> None:
    host = make_host(make_config(str(tiny_encoder)), tmp_path)
    stale = host.begin("run", 1, ["a"])
    host.begin("run", 1, ["a"])
    good, _ = message("b", host.begin("run", 1, ["b"]), 0, [5], seed=1)
    bad, kept = host.forward([message("a", stale, 0, [5], seed=0)[0], good])
    assert isinstance(bad, StaleLease)
    assert isinstance(kept, np.ndarray)


@pytest.mark.parametrize(
    "flaw", ["unknown client", "fewer tokens", "more tokens", "short gradient"]
)
def test_a_message_that_does_not_add_up_is_refused_alone(
    flaw: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Its neighbours in the batch get what they would get without it."""
    found = []
    for with_bad in (False, True):
        host = make_host(make_config(str(tiny_encoder)), tmp_path)
        good = message("b", host.begin("run", 1, ["b"]), 0, [5, 20], seed=1)
        activation, gradient = message("a", host.begin("run", 1, ["a"]), 0, [9], seed=0)
        if flaw == "unknown client":
            activation = replace(activation, clients=("nobody",))
        if flaw in ("fewer tokens", "more tokens"):
            size = 8 if flaw == "fewer tokens" else 10
            activation = replace(activation, h_Ld=np.ones((size, 32), np.float32))
            gradient = replace(gradient, g_Ld=np.ones((size, 32), np.float32))
        if flaw == "short gradient":
            gradient = replace(gradient, g_Ld=gradient.g_Ld[:-1])
        answers = host.backward([(activation, gradient), good] if with_bad else [good])
        if with_bad:
            assert isinstance(answers[0], Exception)
        found.append(bits(*answered(answers[-1:]), theta(host, CLIENTS)))
    assert found[0] == found[1]


def test_begin_rolls_its_clients_back_and_no_others(tiny_encoder: Path, tmp_path: Path) -> None:
    config = make_config(str(tiny_encoder), server={"shared_adapter": True})
    host = make_host(config, tmp_path)
    start = theta(host, CLIENTS)

    def train(lease: Lease, client: str) -> list[bytes]:
        downs: list[np.ndarray] = []
        for step in range(3):
            downs += answered(host.backward([message(client, lease, step, [5, 20], seed=2)]))
        row = CLIENTS.index(client)
        return bits(*downs, theta(host, [client]), common(host, [CLIENTS[row]]))

    first = train(host.begin("run", 1, ["a"]), "a")
    other = train(host.begin("run", 1, ["b"]), "b")
    again = host.begin("run", 1, ["a"])
    assert bits(theta(host, ["a"])) == bits(start[:1])
    assert common(host, [CLIENTS[0]]).abs().max() == 0.0
    assert bits(theta(host, ["b"]), common(host, [CLIENTS[1]])) == other[-2:]
    assert train(again, "a") == first


def test_work_done_under_another_life_is_lost_and_said_so(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    config = make_config(str(tiny_encoder))
    before, after = make_host(config, tmp_path / "1"), make_host(config, tmp_path / "2")
    lease = before.begin("run", 1, ["a"])
    finite, theta_CP = before.report([lease.server], ["a"], True)
    assert finite == [True]
    assert theta_CP.shape[0] == 1
    assert theta_CP.shape[1] > 0
    assert before.report([lease.server], ["a"], False)[1].shape == (1, 0)
    with pytest.raises(StaleLease, match="restarted"):
        after.report([lease.server], ["a"], True)


# --- rounds -------------------------------------------------------------------------------------


def play(host: TrunkHost, rounds: Rounds, first: int, last: int) -> None:
    """Rounds of training and a fixed mixture, committed; a different batch in each."""
    for round in range(first, last + 1):
        lease = host.begin("run", round, CLIENTS)
        for step in range(3):
            sent = [
                message(c, lease, step, [5 + i, 20], seed=10 * round + i, round=round)
                for i, c in enumerate(CLIENTS)
            ]
            answered(host.forward([activation for activation, _ in sent]))
            answered(host.backward(sent))
        _, trained = host.report([lease.server], CLIENTS, True)
        mixed = 0.75 * trained + 0.25 * trained.mean(0)
        taken = ["a", "b", "d"]
        own = host.shared_gradient(round, taken) if host._shared.there else None
        shared_P = None if own is None else mean_gradient(taken, own)
        staged = host.install(Installation(round, CLIENTS, mixed, refused=("c",)), shared_P)
        rounds.commit(round, staged, {})


def state(rounds: Rounds, round: int, shared: bool, moments: bool) -> list[bytes]:
    kinds = ["values", "moment1", "moment2", "steps"]
    personal = rounds.load(
        round, CLIENTS, [f"trunk.{k}" for k in (kinds if moments else kinds[:1])]
    )
    common = [rounds.load_shared(round, f"shared.{kind}") for kind in kinds] if shared else []
    return bits(*personal.values(), *common)


def open_host(
    config: RunConfig, folder: Path, engine: type[Any] = TorchEngine
) -> tuple[TrunkHost, Rounds]:
    rounds = Rounds(Storage(str(folder)))
    host = make_host(config, folder, engine)
    host.forget()
    return host, rounds


@pytest.mark.parametrize("moments", ["reset", "keep"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_restarted_host_goes_on_as_if_nothing_had_happened(
    moments: str, shared: bool, tiny_encoder: Path, tmp_path: Path
) -> None:
    config = make_config(
        str(tiny_encoder), server={"shared_adapter": shared}, train={"moments": moments}
    )
    whole, rounds = open_host(config, tmp_path / "whole")
    play(whole, rounds, 1, 3)
    broken, kept = open_host(config, tmp_path / "broken")
    play(broken, kept, 1, 1)
    second, kept = open_host(config, tmp_path / "broken")
    play(second, kept, 2, 3)
    keep = moments == "keep"
    for round in range(4):
        assert state(rounds, round, shared, keep) == state(kept, round, shared, keep)


def test_the_start_is_shared_by_all(tiny_encoder: Path, tmp_path: Path) -> None:
    host = make_host(make_config(str(tiny_encoder)), tmp_path / "any")
    rounds = host._rounds = host._slots._rounds = Rounds(Storage(str(tmp_path / "new")))
    rounds.commit(0, host.stage_start(), {})
    values = rounds.load(0, CLIENTS, ["trunk.values"])["trunk.values"]
    assert len({row.numpy().tobytes() for row in values}) == 1
    assert values.abs().max() > 0


def test_install_asked_twice_answers_the_same(tiny_encoder: Path, tmp_path: Path) -> None:
    config = make_config(str(tiny_encoder), server={"shared_adapter": True})
    host, rounds = open_host(config, tmp_path)
    lease = host.begin("run", 1, CLIENTS)
    answered(host.backward([message(CLIENTS, lease, 0, [5, 6, 7, 8], seed=0)]))
    mixture = Installation(1, CLIENTS, theta(host, CLIENTS) * 0.5)
    first = host.install(mixture)
    assert host.install(mixture) == first
    assert rounds.commit(1, first, {}) is None
    held = rounds.load(1, CLIENTS, ["trunk.values"])["trunk.values"]
    assert bits(held) == bits(mixture.theta_SP)


@pytest.mark.parametrize("columns", ["mixture", "nothing shared"])
@pytest.mark.parametrize("begun", [(), ("a", "b")])
def test_a_new_life_does_not_install_what_it_did_not_train(
    columns: str, begun: tuple[str, ...], tiny_encoder: Path, tmp_path: Path
) -> None:
    """A server restarted after training holds no moments, no common gradient, no refused rows."""
    config = make_config(str(tiny_encoder), server={"shared_adapter": True})
    old, _ = open_host(config, tmp_path)
    lease = old.begin("run", 1, CLIENTS)
    answered(old.backward([message(CLIENTS, lease, 0, [5, 6, 7, 8], seed=0)]))
    trained = theta(old, CLIENTS)
    new, _ = open_host(config, tmp_path)
    if begun:
        new.begin("run", 1, begun)
    with pytest.raises(StaleLease):
        new.install(Installation(1, CLIENTS, trained if columns == "mixture" else trained[:, :0]))


def test_refused_clients_go_back_to_the_rounds_start(tiny_encoder: Path, tmp_path: Path) -> None:
    host, rounds = open_host(make_config(str(tiny_encoder)), tmp_path)
    play(host, rounds, 1, 1)
    start, end = (rounds.load(r, CLIENTS, ["trunk.values"])["trunk.values"] for r in (0, 1))
    same = [c for i, c in enumerate(CLIENTS) if bits(start[i]) == bits(end[i])]
    assert same == ["c"]


def test_the_shared_adapter_steps_once_a_round_on_the_mean_in_client_order(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    config = make_config(
        str(tiny_encoder),
        server={"shared_adapter": True, "shared_learning_rate": 0.02},
        train={"weight_decay": 0.1},
    )
    host, rounds = open_host(config, tmp_path)
    value = torch.nn.Parameter(rounds.load_shared(0, "shared.values"))
    twin = torch.optim.AdamW([value], lr=0.02, weight_decay=0.1, foreach=False)
    for round in (1, 2):
        lease = host.begin("run", round, CLIENTS)
        for step in range(2):
            answered(
                host.backward([message(CLIENTS, lease, step, [5, 20, 7, 8], round, round=round)])
            )
        gradients = common(host, CLIENTS).clone()
        assert gradients.abs().sum(1).min() > 0
        trained = theta(host, CLIENTS)
        accepted = ["d", "a", "b"]
        shared_P = mean_gradient(accepted, host.shared_gradient(round, accepted))
        mixture = Installation(round, CLIENTS, trained, ("c",))
        rounds.commit(round, host.install(mixture, shared_P), {})
        total = torch.zeros(gradients.shape[1], dtype=torch.float64)
        for row in (0, 1, 3):  # client-id order, without the refused one
            total += gradients[row].double()
        value.grad = total.float() / 3
        twin.step()
        assert bits(rounds.load_shared(round, "shared.values")) == bits(value.detach())
        assert rounds.load_shared(round, "shared.steps").item() == round
        assert common(host, CLIENTS).abs().max() == 0.0


def test_the_shared_adapter_is_used_by_everyone(tiny_encoder: Path, tmp_path: Path) -> None:
    hosts = [
        make_host(make_config(str(tiny_encoder), server={"shared_adapter": s}), tmp_path / str(s))
        for s in (False, True)
    ]
    activation, _ = message("a", None, 0, [5, 20], seed=0, round=0)
    outputs = [answered(host.forward([activation])) for host in hosts]
    assert bits(*outputs[0]) != bits(*outputs[1])


# --- both engines (promise 7) -------------------------------------------------------------------


def compare_engines(encoder: str, folder: Path) -> dict[str, Any]:
    """Three rounds on either engine, and DeepSpeed's once more with a restart in the middle."""
    from fellray.actors.engine import DeepSpeedEngine

    torch.set_num_threads(1)
    # a GPU beside a trunk on the CPU changes nothing
    torch.cuda.is_available = lambda: True
    found: dict[str, Any] = {}
    for shared, dtype in ((True, "float32"), (False, "float32"), (False, "bfloat16")):
        config = make_config(
            encoder,
            server={"shared_adapter": shared, "shared_learning_rate": 0.02, "dtype": dtype},
            train={"weight_decay": 0.1},
        )
        runs = {}
        for name, engine, stops in (
            ("torch", TorchEngine, [3]),
            ("deepspeed", DeepSpeedEngine, [3]),
            ("restarted", DeepSpeedEngine, [1, 2, 3]),
        ):
            first = 0
            for stop in stops:
                host, rounds = open_host(config, folder / f"{name}-{shared}-{dtype}", engine)
                play(host, rounds, first + 1, stop)
                first = stop
            runs[name] = rounds
        loads = {
            name: [r.load(t, CLIENTS, ["trunk.values"])["trunk.values"] for t in range(4)]
            for name, r in runs.items()
        }
        for name in ("deepspeed", "restarted"):
            found[f"{name}, shared {shared}, {dtype}: personal"] = [
                bool(torch.equal(x, y)) for x, y in zip(loads["torch"], loads[name], strict=True)
            ]
        if shared:
            for kind in ("values", "moment1", "moment2", "steps"):
                for name in ("deepspeed", "restarted"):
                    found[f"{name}: shared {kind}"] = [
                        bool(
                            torch.equal(
                                runs["torch"].load_shared(t, f"shared.{kind}"),
                                runs[name].load_shared(t, f"shared.{kind}"),
                            )
                        )
                        for t in range(4)
                    ]
        found[f"shared {shared}, {dtype}: moved"] = not torch.equal(
            loads["torch"][0], loads["torch"][3]
        )
    found["nothing adapted"] = pass_bare_trunk(encoder, folder / "bare")
    return found


def pass_bare_trunk(encoder: str, folder: Path) -> bool:
    """Whether DeepSpeed's engine and torch's give the same of a trunk without any adapter."""
    from fellray.actors.engine import DeepSpeedEngine

    tree = make_config(encoder).model_dump(mode="json") | {"method": {"kind": "fedpa_lora"}}
    config, seen = parse(tree, "test"), []
    for engine in (TorchEngine, DeepSpeedEngine):
        trunk, sites = build_trunk(load_backbone(encoder), config, torch.device("cpu"))
        assert sites == []
        rounds = Rounds(Storage(str(folder / engine.__name__)))
        host = TrunkHost(config, CLIENTS, sites, engine(trunk, config), rounds)
        rounds.commit(0, host.stage_start(), {})
        sent = message("a", host.begin("run", 1, ["a"]), 0, [5, 20], seed=0)
        seen.append(bits(*answered(host.forward([sent[0]])), *answered(host.backward([sent]))))
    return seen[0] == seen[1]


def test_bfloat16_computes_what_float32_does_and_keeps_the_adapters(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        host = make_host(make_config(str(tiny_encoder), server={"dtype": dtype}), tmp_path / dtype)
        before = theta(host, CLIENTS)
        sent = message(CLIENTS, host.begin("run", 1, CLIENTS), 0, [5, 20, 7, 8], seed=0)
        (up,) = answered(host.forward([sent[0]]))
        (down,) = answered(host.backward([sent]))
        assert up.dtype == down.dtype == np.float32
        found[dtype] = (up, down, theta(host, CLIENTS) - before)
    for name, exact, rounded in zip(("up", "down", "step"), *found.values(), strict=True):
        assert not np.array_equal(exact, rounded), name
        near = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
        assert near < (0.4 if name == "step" else 0.1), (name, near)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_in_bfloat16_too_nobody_beside_a_client_changes_its_bits(
    dtype: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    config = make_config(str(tiny_encoder), server={"dtype": dtype})
    together, alone = (make_host(config, tmp_path / name) for name in ("together", "alone"))
    for step in range(3):
        for host, groups in ((together, [CLIENTS]), (alone, [(c,) for c in CLIENTS])):
            if not step:
                host.begin("run", 1, CLIENTS)
            lease = host._admission.turns["a"].lease
            for group in groups:
                own = [
                    message(c, Lease(host._admission.life, lease), step, [5 + i, 20], seed=i)
                    for i, c in enumerate(CLIENTS)
                    if c in group
                ]
                answered(host.forward([activation for activation, _ in own]))
                answered(host.backward(own))
    assert bits(theta(together, CLIENTS)) == bits(theta(alone, CLIENTS))


def test_deepspeeds_engine_equals_torchs(tiny_encoder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tiny_encoder), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3 * 2 + 2 * 4 + 3 + 1
    unequal = {name: equal for name, equal in found.items() if not np.all(equal)}
    assert unequal == {}


if __name__ == "__main__":
    print(json.dumps(compare_engines(sys.argv[1], Path(sys.argv[2]))))
