"""Clients with cuts of their own: the same numbers wherever a block is held, alone or in one batch.

Shapes: C clients, P parameters of one, of a side or of all that is sent.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.train import one_round
from fellray.platform.adapters import Pair, Site, views
from fellray.platform.aggregation import Plan, Reports, reduce
from fellray.platform.config import RunConfig, parse
from fellray.platform.encoder import load_backbone
from fellray.platform.errors import FellrayError
from fellray.platform.host import TrunkHost
from fellray.platform.messages import Activation, Gradient
from fellray.platform.middle import Middle
from fellray.platform.outcome import Outcome
from fellray.platform.own import Own, read_own
from fellray.platform.packed import Batch, PackedBlock, Saved
from fellray.platform.peft_export import export
from fellray.platform.rounds import Rounds
from fellray.platform.run import open_run, read_run
from fellray.platform.shards import Dataset
from fellray.platform.split import cut_model, plan_cut
from fellray.platform.storage import Storage
from fellray.platform.trunk import TorchEngine, Trunk
from fellray.serve.args import Args
from fellray.serve.blends import Blends, name_blend
from fellray.serve.schema import ByUser
from fellray.serve.whole import open_whole

Make = Callable[..., RunConfig]
Play = Callable[..., Any]

CLIENTS = ("c0", "c1", "c2", "c3", "c4")
CUTS = {"c0": 0, "c1": 3, "c2": 2, "c3": 1, "c4": 3}
"""Of five blocks, of which one is the top. c3 has the run's."""
RANK = 4


def write(path: Path, **columns: Sequence[Any]) -> str:
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of `CUTS`."""
    own = {client: cut for client, cut in CUTS.items() if client != "c3"}
    path = tmp_path_factory.mktemp("own") / "cuts.csv"
    return write(path, client=list(own), cut=list(own.values()))


def mixed(make: Make, cuts: str, **overrides: Any) -> RunConfig:
    """Five clients of four cuts."""
    clients = {"own": cuts} | overrides.pop("clients", {})
    model = {"cut": 1, "top": 1, "lora": {"r": RANK}} | overrides.pop("model", {})
    return make(model=model, clients=clients, **overrides)


def fit(config: RunConfig, clients: Sequence[str]) -> tuple[Plant, Reports]:
    """Round 1 of some clients, nothing installed."""
    rounds = Rounds(Storage(config.storage).sub(config.name))
    plant = Plant.inline(config, survey(config), rounds)
    rounds.commit(0, plant.stage_start(), {})
    return plant, plant.fit(1, clients)


def sites(config: RunConfig) -> dict[str, list[Site]]:
    """Of each side, and of all that is sent."""
    settled = survey(config).own.settle(config)
    parts = plan_cut(load_backbone(config.model.name), settled.model).sites
    client, trunk = parts["bottom"] + parts["top"], parts["trunk"]
    return {
        "client": client,
        "trunk": trunk,
        "sent": client + [site for site in trunk if site.cuts is None],
    }


def by_name(rows_P: Tensor, of: Sequence[Site]) -> dict[str, Pair]:
    """One client's adapters."""
    pairs = views(rows_P[None], of, RANK)
    return {site.path: pair for site, pair in zip(of, pairs, strict=True)}


def equal(one: dict[str, Pair], other: dict[str, Pair]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(a, b) for p in one for a, b in zip(one[p], other[p], strict=True))


def pages(rounds: Rounds, round: int, client: str) -> list[Tensor]:
    return [rounds.load(round, [client], [name])[name][0] for name in NAMES]


NAMES = ("client.values", "trunk.values")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": {"clip": 0.5, "weight_decay": 0.1, "moments": "keep"}},
        {"server": {"shared_adapter": True}},
        {"server": {"keep_graphs_mib": 0}},
    ],
    ids=["plain", "clip", "shared", "recompute"],
)
def test_alone_or_among_clients_of_other_cuts(
    settings: dict[str, Any], tiny_config: Make, cuts: str
) -> None:
    """Promise 4, bit for bit."""
    _, together = fit(mixed(tiny_config, cuts, **settings), CLIENTS)
    for row, client in enumerate(CLIENTS):
        _, alone = fit(mixed(tiny_config, cuts, **settings), (client,))
        assert torch.equal(alone.theta_CP[0], together.theta_CP[row]), client
        assert alone.losses[client] == together.losses[client]


@pytest.mark.parametrize(
    "targets", [("query", "value"), pytest.param(("key", "output.dense"), marks=pytest.mark.long)]
)
def test_an_own_cut_is_the_runs_cut_of_that_number(
    targets: tuple[str, ...], tiny_config: Make, cuts: str
) -> None:
    """Bit for bit, block by block."""
    lora = {"r": RANK, "target_modules": targets}
    config = mixed(tiny_config, cuts, model={"lora": lora})
    _, some = fit(config, CLIENTS)
    for row, (client, cut) in enumerate(CUTS.items()):
        plain = tiny_config(model={"cut": cut, "top": 1, "lora": lora})
        _, reports = fit(plain, (client,))
        got = by_name(some.theta_CP[row], sites(config)["sent"])
        assert equal(got, by_name(reports.theta_CP[0], sites(plain)["sent"])), client
        assert reports.losses[client] == some.losses[client]


def test_who_has_a_cut_is_evaluated_with_it(tiny_config: Make, play: Play, cuts: str) -> None:
    """After a round on its own, as the run in which everyone has that cut."""
    settings: dict[str, Any] = {"method": {"kind": "local"}}
    scores = play(mixed(tiny_config, cuts, **settings), last=1).outcomes[1].validation
    untrained = play(mixed(tiny_config, cuts), last=0).outcomes[0].validation
    for cut in range(4):
        plain = tiny_config(model={"cut": cut, "top": 1, "lora": {"r": RANK}}, **settings)
        alike = play(plain, last=1).outcomes[1].validation
        for client in (c for c in CLIENTS if CUTS[c] == cut):
            assert scores[client] == alike[client]
    assert scores != untrained


def test_it_does_not_matter_much_where_a_model_is_cut(tiny_config: Make, tmp_path: Path) -> None:
    """The same client with a short bottom and with a long one: one model, other kernels."""
    rows = []
    for cut in (0, 3):
        own = write(tmp_path / f"{cut}.csv", client=["c1", "c2"], cut=[cut, 3 - cut])
        config = mixed(tiny_config, own)
        _, reports = fit(config, ("c1",))
        rows.append(by_name(reports.theta_CP[0], sites(config)["sent"]))
    one, other = rows
    for path in one:
        for a, b in zip(one[path], other[path], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    assert not equal(one, other)


def test_one_cut_for_all_is_the_runs(tiny_config: Make, play: Play, tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", client=CLIENTS, cut=[2] * 5)
    one = play(mixed(tiny_config, own))
    other = play(tiny_config(model={"cut": 2, "top": 1, "lora": {"r": RANK}}))
    for t in range(len(one.outcomes)):
        assert one.hashes(t) == other.hashes(t)
        assert one.outcomes[t].validation == other.outcomes[t].validation
        assert one.ledger[t] == other.ledger[t]


@pytest.mark.parametrize("method", ["fellrec", pytest.param("fedavg", marks=pytest.mark.long)])
def test_any_grouping_gives_the_same_run(
    method: str, tiny_config: Make, play: Play, cuts: str
) -> None:
    one, other, third = [
        play(
            mixed(
                tiny_config,
                cuts,
                method={"kind": method},
                clients=clients,
                server=server,
                train={"moments": "keep"},
            ),
            last=2,
        )
        for clients, server in (
            ({"per_actor": 5}, {}),
            ({"per_actor": 3, "slots": 2}, {"count": 2}),
            ({"per_actor": 5, "crews": 3}, {"keep_graphs_mib": 0}),
        )
    ]
    for t in range(3):
        assert one.hashes(t) == other.hashes(t) == third.hashes(t)
        assert one.outcomes[t].validation == other.outcomes[t].validation
        assert one.ledger[t] == other.ledger[t]
    assert len(set(one.hashes(2).values())) == (1 if method == "fedavg" else 5)


def test_blocks_are_mixed_by_name_and_given_to_who_holds_them(tiny_config: Make, cuts: str) -> None:
    """Two clients, by hand: c0 holds no block but the top, c1 three more."""
    config = mixed(tiny_config, cuts)
    plant, reports = fit(config, ("c0", "c1"))
    weights = [[0.75, 0.25], [0.5, 0.5]]
    plan = Plan(torch.tensor(weights, dtype=torch.float64))
    sent = [by_name(row, sites(config)["sent"]) for row in reports.theta_CP]
    staged = plant.install(reports, plan, reduce(plan, reports.theta_CP.clone()))
    plant._rounds.commit(1, staged, {})
    for row, client in enumerate(("c0", "c1")):
        ends, trunk = pages(plant._rounds, 1, client)
        held = {"client": by_name(ends, sites(config)["client"])}
        held["trunk"] = by_name(trunk, sites(config)["trunk"])
        for path in sent[0]:
            block = int(path.split(".")[2])
            side = "client" if block < CUTS[client] or block == 4 else "trunk"
            away = held["trunk" if side == "client" else "client"].get(path)
            for part in (0, 1):
                wanted = weights[row][0] * sent[0][path][part]
                wanted = wanted + weights[row][1] * sent[1][path][part]
                torch.testing.assert_close(held[side][path][part], wanted)
                assert away is None or not away[part].any(), (client, path)


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_an_average_for_all_is_read_by_everyone_in_part(
    moments: str, tiny_config: Make, cuts: str
) -> None:
    """FedAvg: in memory as from the page, which is whole."""
    config = mixed(tiny_config, cuts, method={"kind": "fedavg"}, train={"moments": moments})
    plant, first = fit(config, CLIENTS)
    plan = config.method.plan(first.meta)
    mean_P = first.theta_CP.double().mean(0).float()
    plant._rounds.commit(1, plant.install(first, plan, reduce(plan, first.theta_CP)), {})
    wanted = by_name(mean_P, sites(config)["sent"])
    for side, page in zip(("client", "trunk"), pages(plant._rounds, 1, "c3"), strict=True):
        for path, pair in by_name(page, sites(config)[side]).items():
            for part, whole in zip(pair, wanted[path], strict=True):
                torch.testing.assert_close(part, whole)
    fresh = Plant.inline(config, survey(config), plant._rounds).fit(2, CLIENTS)
    assert torch.equal(fresh.theta_CP, plant.fit(2, CLIENTS).theta_CP)


@pytest.mark.parametrize("share", ["all", pytest.param("none", marks=pytest.mark.long)])
def test_a_run_that_was_interrupted_goes_on(
    share: str, tiny_config: Make, play: Play, cuts: str
) -> None:
    train = {"share": share, "moments": "keep"}
    whole = play(mixed(tiny_config, cuts, train=train), last=3)
    config = mixed(tiny_config, cuts, train=train)
    play(config, last=1)
    rest = play(config, last=3)
    assert rest.hashes(3) == whole.hashes(3)
    assert rest.outcomes[-1].validation == whole.outcomes[-1].validation


def test_ranks_and_histories_of_ones_own_too(tiny_config: Make, tmp_path: Path) -> None:
    own = write(
        tmp_path / "own.csv",
        client=CLIENTS,
        rank=[1, 2, 4, 3, 4],
        local_samples=[12, 5, 12, 20, 9],
        cut=list(CUTS.values()),
    )
    _, together = fit(mixed(tiny_config, own), CLIENTS)
    for row, client in enumerate(CLIENTS):
        _, alone = fit(mixed(tiny_config, own), (client,))
        assert torch.equal(alone.theta_CP[0], together.theta_CP[row]), client


def test_similarity_counts_every_block_once(tiny_config: Make, cuts: str) -> None:
    config = mixed(tiny_config, cuts)
    plant, reports = fit(config, CLIENTS)
    start = [*pages(plant._rounds, 0, "c0")]
    names = by_name(start[0], sites(config)["client"])
    names |= by_name(start[1], sites(config)["trunk"])
    for row in range(len(CLIENTS)):
        moved = by_name(reports.theta_CP[row], sites(config)["sent"])
        square = sum(
            (part - was).double().square().sum()
            for path in moved
            for part, was in zip(moved[path], names[path], strict=True)
        )
        assert reports.meta.gram["update"][row, row].item() == pytest.approx(
            float(square), rel=1e-4
        )


@pytest.mark.parametrize("shared", [False, True])
def test_exported_adapters_are_whole(
    shared: bool, tiny_config: Make, play: Play, cuts: str
) -> None:
    """Each block from who holds it; the shared adapter where the server does."""
    config = mixed(tiny_config, cuts, server={"shared_adapter": shared})
    with open_run(config, "data"):
        play(config, last=1)
    run = read_run(f"{config.storage}/{config.name}")
    export(run, 1, CLIENTS)
    for client, cut in CUTS.items():
        ends, trunk = pages(run.rounds, 1, client)
        held = {"client": by_name(ends, sites(config)["client"])}
        held["trunk"] = by_name(trunk, sites(config)["trunk"])
        folder = Path(config.storage) / config.name / "adapters" / client
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        assert len(tensors) == 2 * 5 * len(config.model.lora.target_modules)
        for path in held["client"] | held["trunk"]:
            block = int(path.split(".")[2])
            at_server = cut <= block < 4
            a, _ = held["trunk" if at_server else "client"][path]
            found = tensors[f"base_model.model.{path}.lora_A.weight"]
            assert torch.equal(found[:RANK], a[0]), (client, path)
            assert len(found) == (2 * RANK if shared and at_server else RANK)
        told = json.loads((folder / "adapter_config.json").read_text())
        doubled = (4 - cut) * len(config.model.lora.target_modules) if shared else 0
        assert len(told["rank_pattern"]) == doubled


def test_who_is_served_has_its_cut(tiny_config: Make, play: Play, cuts: str) -> None:
    """Its ranking is the one that was evaluated, and the order of others' asking does not count."""
    config = mixed(tiny_config, cuts, evaluation={"max_users": None}, keep_last=3)
    world = survey(config)
    with open_run(config, world.data_sha256) as run:
        plant = Plant.inline(config, world, run.rounds)
        for t in (0, 1):
            outcome = one_round(plant, t, config)
            run.commit(t, outcome, plant.close_ledger(), [])
        scores = plant.evaluate(1, 2)
    data = Dataset(config.data.path)
    folder = f"{config.storage}/{config.name}"
    served = open_whole(Args.model_validate({"run": folder, "round": 1}))
    try:
        for client in CLIENTS:
            held = data.shard(client).held_out(2)
            queries = [ByUser(client=client, user_id=u, as_of="test") for u in held.users.tolist()]
            answers = asyncio.run(served.recommend(queries))
            hits = sum(
                bool({place.item_id for place in answer.items} & set(data.item_ids[truth].tolist()))
                for answer, truth in zip(answers, held.truth, strict=True)
            )
            assert hits / len(queries) == pytest.approx(scores[client].means()["hit@10"]), client
    finally:
        served.close()


def test_a_mean_of_clients_has_each_block_from_who_holds_it(
    tiny_config: Make, play: Play, cuts: str
) -> None:
    config = mixed(tiny_config, cuts)
    world, run = survey(config), play(config, last=1)
    storage = Storage(config.storage).sub(config.name)
    middle = Middle(sites(config)["client"], RANK)
    blends = Blends(storage, CLIENTS, world.own, middle)
    name = name_blend(["c0", "c1"])
    (mean_P,) = blends.load(1, [name], ["client.values"])["client.values"]
    found = by_name(mean_P, sites(config)["client"])
    ends, trunks = zip(*(pages(run.rounds, 1, client) for client in ("c0", "c1")), strict=True)
    whole = torch.empty(2, sum(site.num_parameters(RANK) for site in sites(config)["sent"]))
    whole[:, : len(ends[0])] = torch.stack(ends)
    middle.join_(whole, torch.stack(trunks), [CUTS["c0"], CUTS["c1"]])
    wanted = by_name(whole.double().mean(0).float(), sites(config)["sent"])
    for path, pair in found.items():
        for part, other in zip(pair, wanted[path], strict=True):
            torch.testing.assert_close(part, other)
    assert world.own.cuts_of([name, "c0"]) == [3, 0]


def test_a_run_keeps_its_cuts(tiny_config: Make, tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    write(own, client=["c1", "c2"], cut=["2", "1.0"])
    config = mixed(tiny_config, str(own))
    with open_run(config, "data") as run:
        run.commit(0, Outcome((), None), [], [])
        assert run.own().cuts == dict.fromkeys(CLIENTS, 1) | {"c1": 2}
    assert read_run(f"{config.storage}/{config.name}").config.model.span == (1, 2)
    write(own, client=["c1"], cut=[0])
    with (
        pytest.raises(FellrayError, match=r"differs in .*own\.csv holds"),
        open_run(config, "data"),
    ):
        pass


def test_who_reads_for_all_has_the_runs_cut(tiny_config: Make, cuts: str) -> None:
    config = mixed(tiny_config, cuts, method={"kind": "central"})
    assert read_own(config).cuts == {}
    assert survey(config).own.settle(config).model.span == (1, 1)


@pytest.mark.parametrize(
    ("text", "train", "words"),
    [
        (
            "client,cut\nc0,1\nc1,4\n",
            {},
            ["cut 4 of client 'c1'", "5 blocks", "model.top=1", "0 to 3"],
        ),
        (
            "client,cut\nc0,-1\n",
            {},
            ["cut of client 'c0' (row 1) is '-1'", "whole number of 0 or more"],
        ),
        ("client,cut\nc0,x\n", {}, ["cut of client 'c0' (row 1) is 'x'"]),
        ("client,cut\nc0,2\n", {"share": "trunk_only"}, ["train.share", "all or none", "column"]),
        ("client,k\nc0,2\n", {}, ["unknown column 'k'", "client, rank, local_samples, cut"]),
    ],
)
def test_bad_cuts(
    text: str, train: dict[str, str], words: list[str], tiny_config: Make, tmp_path: Path
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(FellrayError) as caught:
        survey(mixed(tiny_config, str(path), train=train))
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


# --- one batch ----------------------------------------------------------------------------------


def open_host(tiny_encoder: Path, folder: Path, kept_mib: int) -> TrunkHost:
    """A host of the first four clients, adapters drawn at random."""
    model = {"name": str(tiny_encoder), "cut": 1, "top": 1, "lora": {"r": 2}}
    server = {"engine": "torch", "keep_graphs_mib": kept_mib}
    config = parse({"name": "run", "model": model, "server": server}, "test")
    own = Own(cuts={client: CUTS[client] for client in CLIENTS[:4]})
    config = own.settle(config)
    parts = cut_model(load_backbone(config.model.name), config.model)
    trunk = parts.cut.sites["trunk"]
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(4, sum(site.num_parameters(2) for site in trunk), generator=draw) * 0.1
    rounds = Rounds(Storage(str(folder)))
    if rounds.latest() is None:
        staged = rounds.stage(0, "trunk", CLIENTS[:4], {"trunk.values": values})
        rounds.commit(0, [staged], {})
    engine = TorchEngine(Trunk(parts.trunk, values[0]), config)
    return TrunkHost(config, CLIENTS, trunk, engine, rounds, own=own)


def train_all(host: TrunkHost, draw: np.random.Generator | None) -> dict[str, list[bytes]]:
    """What each client sees in six steps; alone, or forward and backward in random company."""
    seen: dict[str, list[bytes]] = {client: [] for client in CLIENTS[:4]}
    leases = {client: host.begin("run", 1, [client]) for client in seen}
    for step in range(6):
        sent = {}
        for at, client in enumerate(seen):
            own = np.random.default_rng([at, step])
            lengths = own.integers(1, 40, 2).astype(np.int32)
            h, g = own.standard_normal((2, int(lengths.sum()), 32), dtype=np.float32)
            places = np.zeros(2, np.int32)
            header = Activation("run", 1, step, leases[client], (client,), places, lengths, h)
            sent[client] = header, Gradient("run", 1, step, g)
        for way in ("forward", "backward"):
            group_of = np.arange(4) if draw is None else draw.integers(0, 3, 4)
            for group in range(4):
                some = [c for c, own in zip(seen, group_of, strict=True) if own == group]
                if draw is not None:
                    draw.shuffle(some)
                asked = [sent[c][0] if way == "forward" else sent[c] for c in some]
                for client, answer in zip(some, getattr(host, way)(asked), strict=True):
                    seen[client].append(answer.tobytes())
    for client in seen:
        seen[client].append(host.report([], [client], True)[1].tobytes())
    return seen


@pytest.mark.parametrize("kept_mib", [0, 1, 512])
def test_random_groupings(kept_mib: int, tiny_encoder: Path, tmp_path: Path) -> None:
    wanted = train_all(open_host(tiny_encoder, tmp_path, 0), None)
    for seed in range(6):
        host = open_host(tiny_encoder, tmp_path, kept_mib)
        assert train_all(host, np.random.default_rng(seed)) == wanted, seed


def test_a_batch_runs_every_block_once_for_those_who_are_in(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    sound = PackedBlock.forward

    def heard(self: PackedBlock, x_Md: Tensor, batch: Batch) -> tuple[Tensor, Saved]:
        ran.append(len(x_Md))
        return sound(self, x_Md, batch)

    monkeypatch.setattr(PackedBlock, "forward", heard)
    host = open_host(tiny_encoder, tmp_path, 512)
    sent = []
    for client in CLIENTS[:4]:
        h = np.ones((20, 32), np.float32)
        one, lengths = np.zeros(1, np.int32), np.array([20], np.int32)
        lease = host.begin("run", 1, [client])
        sent.append(Activation("run", 1, 0, lease, (client,), one, lengths, h))
    host.forward(sent)
    assert ran == [24, 48, 72, 96], "20 tokens of each, padded, of cuts 0 to 3"
    ran.clear()
    host.forward([sent[1]])
    assert ran == [24], "of cut 3: nothing is computed before"
