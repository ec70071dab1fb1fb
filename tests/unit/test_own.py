"""Clients that differ: who has what of its own, whose bits that changes, and what is refused.

Shapes: C clients, P parameters of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.platform.adapters import Pair, Site, views
from fellray.platform.aggregation import Plan, Reports, reduce
from fellray.platform.config import RunConfig
from fellray.platform.encoder import load_backbone
from fellray.platform.errors import FellrayError
from fellray.platform.outcome import Outcome
from fellray.platform.own import ALIKE, Own, read_own
from fellray.platform.rounds import Rounds
from fellray.platform.run import open_run, read_run
from fellray.platform.slots import Slots
from fellray.platform.split import plan_cut
from fellray.platform.storage import Storage

Make = Callable[..., RunConfig]
Play = Callable[..., Any]

CLIENTS = ("c0", "c1", "c2", "c3", "c4")
RANKS = {"c0": 1, "c1": 2, "c3": 3}
"""Of at most 4."""


def table(path: Path, **columns: Sequence[Any]) -> Path:
    """A CSV file, None where a cell is empty."""
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join("" if v is None else str(v) for v in r) for r in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of `RANKS`."""
    path = tmp_path_factory.mktemp("own") / "ranks.csv"
    return str(table(path, client=list(RANKS), rank=list(RANKS.values())))


def mixed(make: Make, ranks: str, **overrides: Any) -> RunConfig:
    """Five clients of four ranks."""
    clients = {"own": ranks} | overrides.pop("clients", {})
    lora = {"r": 4} | overrides.pop("lora", {})
    return make(model={"lora": lora}, clients=clients, **overrides)


def sites(config: RunConfig) -> list[Site]:
    """Of everything that is sent."""
    parts = plan_cut(load_backbone(config.model.name), config.model).sites
    return parts["bottom"] + parts["top"] + parts["trunk"]


def cut(theta_CP: Tensor, config: RunConfig, rank: int) -> tuple[list[Pair], list[Pair]]:
    """Every site's first components, and the rest."""
    whole = views(theta_CP, sites(config), config.model.lora.r)
    first = [(a[:, :rank], b[:, :, :rank]) for a, b in whole]
    return first, [(a[:, rank:], b[:, :, rank:]) for a, b in whole]


def flat(pairs: Sequence[Pair]) -> Tensor:
    return torch.cat([t.flatten() for pair in pairs for t in pair])


def fit(config: RunConfig, clients: Sequence[str], round: int = 1) -> tuple[Plant, Reports]:
    """A round of some clients from the start, nothing installed."""
    rounds = Rounds(Storage(config.storage).sub(config.name))
    plant = Plant.inline(config, survey(config), rounds)
    if rounds.latest() is None:
        rounds.commit(0, plant.stage_start(), {})
    return plant, plant.fit(round, clients)


@dataclass(frozen=True)
class Two:
    """Two rounds of some clients."""

    plant: Plant
    reports: list[Reports]
    scores: dict[str, dict[str, float]]
    """After the first round, by the first actor."""


def two_rounds(config: RunConfig, clients: Sequence[str]) -> Two:
    """Trained, installed, trained on."""
    plant, first = fit(config, clients)
    plan = config.method.plan(first.meta)
    mixed_CP = reduce(plan, first.theta_CP)
    plant._rounds.commit(1, plant.install(first, plan, mixed_CP), {})
    (actor,) = plant._clients.members  # type: ignore[attr-defined]
    scores = {c: s.means() for c, s in actor.evaluate(1, 1, 5, tuple(clients)).items()}
    return Two(plant, [first, plant.fit(2, clients)], scores)


def pages(plant: Plant, round: int, clients: Sequence[str]) -> Tensor:
    """What is written of them [C, P]."""
    loaded = plant._rounds.load(round, clients, ["client.values", "trunk.values"])
    return torch.cat(list(loaded.values()), 1)


def steps(plant: Plant) -> dict[str, int]:
    """What the server counted of each client."""
    (host,) = plant._servers.pool.members  # type: ignore[attr-defined]
    return {client: turn.next_step for client, turn in host._admission.turns.items()}


# --- rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [{}, {"clip": 0.5, "weight_decay": 0.1}], ids=["plain", "clip"])
@pytest.mark.parametrize("shared", [False, True], ids=["personal", "shared"])
def test_alone_or_among_clients_of_other_ranks(
    shared: bool, train: dict[str, Any], tiny_config: Make, ranks: str
) -> None:
    """Promise 4, bit for bit."""
    server = {"shared_adapter": shared}
    _, together = fit(mixed(tiny_config, ranks, server=server, train=train), CLIENTS)
    for row, client in enumerate(CLIENTS):
        _, alone = fit(mixed(tiny_config, ranks, server=server, train=train), (client,))
        assert torch.equal(alone.theta_CP[0], together.theta_CP[row]), client
        assert alone.losses[client] == together.losses[client]


def test_who_has_the_largest_rank_is_not_touched_by_the_others(
    tiny_config: Make, ranks: str
) -> None:
    _, some = fit(mixed(tiny_config, ranks), CLIENTS)
    _, nobody = fit(tiny_config(model={"lora": {"r": 4}}), CLIENTS)
    same = [torch.equal(a, b) for a, b in zip(some.theta_CP, nobody.theta_CP, strict=True)]
    assert same == [client not in RANKS for client in CLIENTS]


@pytest.mark.parametrize(
    ("moments", "lora"), [("keep", {}), ("reset", {"use_rslora": True, "lora_alpha": 5.0})]
)
def test_a_rank_of_ones_own_is_a_run_of_that_rank(
    moments: str, lora: dict[str, Any], tiny_config: Make, ranks: str
) -> None:
    """Two rounds, start and scale included; what is behind the rank is zero, bit for bit."""
    settings: dict[str, Any] = {"method": {"kind": "local"}, "train": {"moments": moments}}
    own_config = mixed(tiny_config, ranks, lora=lora, **settings)
    own = two_rounds(own_config, tuple(RANKS))
    for row, (client, rank) in enumerate(RANKS.items()):
        config = tiny_config(model={"lora": lora | {"r": rank}}, **settings)
        plain = two_rounds(config, (client,))
        start_1P = pages(plain.plant, 0, [client])
        for t in (0, 1):
            got_1P, wanted_1P = own.reports[t].theta_CP[row][None], plain.reports[t].theta_CP
            first, rest = cut(got_1P, own_config, rank)
            moved = flat(views(wanted_1P - start_1P, sites(config), rank))
            off = flat(first) - flat(views(wanted_1P, sites(config), rank))
            assert off.norm() < 1e-4 * moved.norm(), (client, t)
            assert flat(rest).abs().max() == 0.0
            losses = own.reports[t].losses[client], plain.reports[t].losses[client]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert own.scores[client] == pytest.approx(plain.scores[client], abs=1e-9)


def test_any_grouping_gives_the_same_run(tiny_config: Make, play: Play, ranks: str) -> None:
    one, other = [
        play(mixed(tiny_config, ranks, clients=clients, train={"moments": "keep"}), last=1)
        for clients in ({"per_actor": 5}, {"per_actor": 3, "slots": 2})
    ]
    for t in range(2):
        assert other.hashes(t) == one.hashes(t)
        assert other.outcomes[t].validation == one.outcomes[t].validation
        assert other.ledger[t] == one.ledger[t]


def test_a_mixture_is_cut_to_who_receives_it(tiny_config: Make, ranks: str) -> None:
    """Two clients, by hand: c1 of rank 2 and c2 of rank 4."""
    config = mixed(tiny_config, ranks)
    plant, reports = fit(config, ("c1", "c2"))
    narrow, wide = reports.theta_CP
    assert flat(cut(narrow[None], config, 2)[1]).abs().max() == 0.0, "zeros are sent"
    plan = Plan(torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64))
    own, wide_own = narrow * 0.75 + wide * 0.25, narrow * 0.5 + wide * 0.5
    staged = plant.install(reports, plan, reduce(plan, reports.theta_CP))
    plant._rounds.commit(1, staged, {})
    page_CP = pages(plant, 1, ["c1", "c2"])
    torch.testing.assert_close(page_CP[1], wide_own)
    first, rest = cut(page_CP[:1], config, 2)
    torch.testing.assert_close(flat(first), flat(cut(own[None], config, 2)[0]))
    assert flat(cut(own[None], config, 2)[1]).abs().max() > 0, "there was something to cut"
    assert flat(rest).abs().max() == 0.0


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_an_average_for_all_is_cut_by_everyone(moments: str, tiny_config: Make, ranks: str) -> None:
    """FedAvg: everyone's page is whole, and who has a smaller rank goes on from a part of it."""
    settings: dict[str, Any] = {"method": {"kind": "fedavg"}, "train": {"moments": moments}}
    config = mixed(tiny_config, ranks, **settings)
    two = two_rounds(config, CLIENTS)
    first, second = (reports.theta_CP for reports in two.reports)
    mean_P = first.double().mean(0).float()
    for client in CLIENTS:
        torch.testing.assert_close(pages(two.plant, 1, [client])[0], mean_P)
    for row, client in enumerate(CLIENTS):
        rest = flat(cut(second[row][None], config, RANKS.get(client, 4))[1])
        assert not rest.any()
    again = two.plant._rounds
    fresh = Plant.inline(config, survey(config), again).fit(2, CLIENTS)
    assert torch.equal(fresh.theta_CP, second), "in memory as from the page"


@pytest.mark.parametrize("share", ["all", "trunk_only"])
def test_similarity_counts_what_a_client_has(share: str, tiny_config: Make, ranks: str) -> None:
    """From round 0's page, which is whole, to c0's row, which is not."""
    config = mixed(tiny_config, ranks, train={"share": share})
    plant, reports = fit(config, ("c0", "c2"))
    start_1P = pages(plant, 0, ["c0"])[:, -reports.theta_CP.shape[1] :]
    parts = plan_cut(load_backbone(config.model.name), config.model).sites
    sent = sites(config) if share == "all" else parts["trunk"]
    moved = views(reports.theta_CP[:1] - start_1P, sent, 4)
    had = flat([(a[:, :1], b[:, :, :1]) for a, b in moved]).double().square().sum().item()
    gram = reports.meta.gram["update"]
    assert gram[0, 0].item() == pytest.approx(had, rel=1e-5)
    assert flat(moved).double().square().sum().item() > 2 * had, "the rest would be heard"


# --- histories a round --------------------------------------------------------------------------


def test_own_histories_are_own_steps(tiny_config: Make, tmp_path: Path) -> None:
    """12 for most, in steps of 4: nobody else's bits change."""
    own = str(table(tmp_path / "own.csv", client=["c1", "c4"], local_samples=[5, 20]))
    plant, some = fit(tiny_config(clients={"own": own, "crews": 1}), CLIENTS)
    assert steps(plant) == {"c0": 3, "c1": 2, "c2": 3, "c3": 3, "c4": 5}
    assert some.meta.samples_C.tolist() == [12, 5, 12, 12, 20]
    assert some.samples == 61
    plain_plant, plain = fit(tiny_config(clients={"crews": 1}), CLIENTS)
    assert set(steps(plain_plant).values()) == {3}
    same = [torch.equal(a, b) for a, b in zip(some.theta_CP, plain.theta_CP, strict=True)]
    assert same == [True, False, True, True, False]
    for row, client in ((1, "c1"), (4, "c4")):
        alone, reports = fit(tiny_config(clients={"own": own}), (client,))
        assert torch.equal(reports.theta_CP[0], some.theta_CP[row])
        assert reports.losses[client] == some.losses[client]
        assert steps(alone) == {client: steps(plant)[client]}
    for samples, row, client in ((5, 1, "c1"), (20, 4, "c4")):
        _, all_alike = fit(tiny_config(train={"local_samples": samples}), (client,))
        assert torch.equal(all_alike.theta_CP[0], some.theta_CP[row])


def test_who_is_done_leaves_its_slot(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the server, while others of its crew go on."""
    left: list[tuple[str, ...]] = []
    sound = Slots.finish

    def heard(self: Slots, clients: Sequence[str]) -> None:
        if self._part == "trunk" and clients:
            left.append(tuple(clients))
        sound(self, clients)

    monkeypatch.setattr(Slots, "finish", heard)
    own = str(table(tmp_path / "own.csv", client=["c1", "c4"], local_samples=[5, 20]))
    fit(tiny_config(clients={"own": own, "crews": 1}), CLIENTS)
    assert left == [("c1",), ("c0", "c2", "c3"), ("c4",)]


def test_who_reads_for_all_reads_what_they_would_and_has_the_runs_rank(
    tiny_config: Make, tmp_path: Path
) -> None:
    own = table(tmp_path / "own.csv", client=["c1", "c4"], local_samples=[5, 20], rank=[1, 1])
    config = tiny_config(method={"kind": "central"}, clients={"own": str(own)})
    _, reports = fit(config, ("central",))
    assert reports.samples == 3 * 12 + 5 + 20
    assert read_own(config).ranks == {}


# --- the file -----------------------------------------------------------------------------------


def test_a_file_says_what_it_says(tiny_config: Make, tmp_path: Path) -> None:
    def read(path: Path) -> Own:
        return read_own(tiny_config(model={"lora": {"r": 8}}, clients={"own": str(path)}))

    wanted = Own({"c1": 4, "c3": 8}, {"c2": 30, "c3": 1})
    columns: dict[str, list[Any]] = {
        "client": ["c3", "c1", "c2", "c0"],
        "rank": [8, 4, None, None],
        "local_samples": [1, None, 30, None],
    }
    assert read(table(tmp_path / "a.csv", **columns)) == wanted
    (tmp_path / "b.csv").write_text("rank;client;local_samples\n8.0; c3;1\n".replace("; c", ";c"))
    assert read(tmp_path / "b.csv") == Own({"c3": 8}, {"c3": 1})
    for kind in (pa.int8(), pa.uint64(), pa.float64(), pa.string()):
        text = [None if v is None else str(v) for v in columns["rank"]]
        values = pa.array(text if kind == pa.string() else columns["rank"], kind)
        made = pa.table({**columns, "rank": values})
        pq.write_table(made, tmp_path / "c.parquet")
        assert read(tmp_path / "c.parquet") == wanted
    nothing = pa.table({"client": ["c0"], "rank": pa.nulls(1)})
    pq.write_table(nothing, tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == ALIKE
    assert read_own(tiny_config()) is ALIKE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,rank\nc0,1\n", ["needs one column 'client'", "it has name, rank"]),
        ("client\nc0\n", ["says nothing", "client, rank, local_samples"]),
        ("client,ranks\nc0,1\n", ["unknown column 'ranks'", "client, rank, local_samples"]),
        ("client,rank,rank\nc0,1,1\n", ["'rank' twice"]),
        ("client,rank\n", ["has no rows", "leave clients.own out"]),
        ("client,rank\nc0,1\n,2\n", ["client is empty in row 2"]),
        ("client,rank\nc0,1\nc9,2\n", ["'c9' (row 2)", "not among the 5 clients"]),
        ("client,rank\nc0,1\nc1,2\nc0,1\n", ["'c0' is named in row 1 and in row 3", "remove one"]),
        ("client,rank\nc0,1\nc1,five\n", ["rank of client 'c1' (row 2) is 'five'", "whole number"]),
        ("client,local_samples\nc0,1.5\n", ["local_samples of client 'c0' (row 1) is '1.5'"]),
        ("client,local_samples\nc0,0\n", ["local_samples of client 'c0' (row 1) is '0'"]),
        ("client,local_samples\nc0,-3\n", ["is '-3'"]),
        ("client,local_samples\nc0,9999999999\n", ["is '9999999999'"]),
        ("client,rank\nc0,2\nc1,9\nc2,12\n", ["rank 9", "'c1' (row 2)", "=4,", "model.lora.r=12"]),
        ("client,rank\nc0,1,2\n", ["cannot be read"]),
    ],
)
def test_bad_files(text: str, words: list[str], tiny_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    config = tiny_config(model={"lora": {"r": 4}}, clients={"own": str(path)})
    with pytest.raises(FellrayError) as caught:
        survey(config)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_bad_files_of_other_kinds(tiny_config: Make, tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(FellrayError) as caught:
            read_own(tiny_config(clients={"own": str(tmp_path / name)}))
        return str(caught.value)

    assert "does not exist; check clients.own" in refusal("nowhere.csv")
    assert "must end in .parquet" in refusal("own.txt")
    (tmp_path / "own.parquet").write_text("client,rank\n")
    assert "cannot be read" in refusal("own.parquet")
    pq.write_table(pa.table({"client": [0], "rank": [1]}), tmp_path / "own.parquet")
    assert "client is of type int64; it must be text" in refusal("own.parquet")
    pq.write_table(pa.table({"client": ["c0"], "rank": [True]}), tmp_path / "own.parquet")
    assert "rank is of type bool" in refusal("own.parquet")
    pq.write_table(pa.table({"client": ["c0"], "rank": [1.25]}), tmp_path / "own.parquet")
    assert "rank of client 'c0' (row 1) is 1.25" in refusal("own.parquet")


def test_a_run_goes_on_with_what_it_began_with(tiny_config: Make, tmp_path: Path) -> None:
    own = table(tmp_path / "own.csv", client=["c1"], local_samples=[5], rank=[1])
    config = tiny_config(clients={"own": str(own)})
    with open_run(config, "data") as run:
        run.commit(0, Outcome((), None), [], [])
        held = run.own()
    assert held == Own({"c1": 1}, {"c1": 5})
    table(own, rank=[1], local_samples=["5.0"], client=["c1"])
    with open_run(config, "data"):
        pass  # the same, written in another way
    table(own, client=["c1"], local_samples=[6], rank=[1])
    with (
        pytest.raises(FellrayError, match=r"differs in what .*own\.csv holds"),
        open_run(config, "data"),
    ):
        pass
    without = config.model_copy(update={"clients": config.clients.model_copy(update={"own": None})})
    with pytest.raises(FellrayError, match=r"differs in clients\.own\)"), open_run(without, "data"):
        pass
    own.unlink()
    assert read_run(f"{config.storage}/{config.name}").own() == held
