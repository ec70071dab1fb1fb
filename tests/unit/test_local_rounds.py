"""What a rule of local training keeps is committed, taken back and resumed like the weights."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fellray.actors.plant import Plant
from fellray.actors.pool import InlinePool
from fellray.actors.server import make_host
from fellray.actors.world import survey
from fellray.platform.adapters import cut_, name_blocks, start, views
from fellray.platform.bank import state_names
from fellray.platform.config import RunConfig
from fellray.platform.handover import hand_over
from fellray.platform.host import TrunkHost
from fellray.platform.ledger import total
from fellray.platform.messages import Lease, StaleLease
from fellray.platform.rounds import EVERYONE, Rounds
from fellray.platform.storage import Storage

Make = Callable[..., RunConfig]
Play = Callable[..., Any]

SGD = {"optimizer": "sgd", "learning_rate": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "fedprox": {"method": {"kind": "fedprox"}, "train": {"moments": "keep"}},
    "ffa_lora": {"method": {"kind": "ffa_lora"}, "train": {"moments": "keep"}},
    "ditto": {"method": {"kind": "ditto"}},
    "fedamp": {"method": {"kind": "fedamp"}, "train": {"moments": "keep"}},
    "scaffold": {"method": {"kind": "scaffold"}, "train": SGD},
}
LITTLE = {"evaluation": {"every": 9, "max_users": 2}}


@pytest.fixture(scope="module")
def plain(tiny_config: Make, play: Play) -> Play:
    """Each method's undisturbed run, played once."""
    known: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in known:
            known[name] = play(tiny_config(**METHODS[name], **LITTLE))
        return known[name]

    return run


def names_of(config: RunConfig) -> list[str]:
    keep, rule = config.train.moments == "keep", config.method.local()
    return [name for part in ("client", "trunk") for name in state_names(part, keep, rule)]


def assert_same(found: Any, wanted: Any, rounds: Sequence[int]) -> None:
    for t in rounds:
        one, other = (r.rounds.load(t, r.learners, names_of(r.config)) for r in (found, wanted))
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), (t, name)


OFTEN = ("ditto", "scaffold")
"""Methods that keep most; the others are tried with the long tests."""


@pytest.mark.parametrize(
    "name", [m if m in OFTEN else pytest.param(m, marks=pytest.mark.long) for m in METHODS]
)
def test_any_grouping_order_and_interruption_gives_the_same_run(
    name: str, tiny_config: Make, play: Play, plain: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three actors of two servers, asked in another order, clients one by one; resumed after the
    first round."""
    wanted = plain(name)
    sound = InlinePool.map

    def shuffled(pool: InlinePool, method: str, *columns: Sequence[Any], **few: Any) -> list[Any]:
        if len(pool.members) != 3:
            return sound(pool, method, *columns, **few)
        answers = {
            i: getattr(pool.members[i], method)(*(column[i] for column in columns))
            for i in (2, 0, 1)
        }
        return [answers[i] for i in sorted(answers)]

    monkeypatch.setattr(InlinePool, "map", shuffled)
    clients = {"per_actor": 2, "slots": 1}
    config = tiny_config(**METHODS[name] | {"clients": clients, "server": {"count": 2}}, **LITTLE)
    for last in (1, 2):
        found = play(config, last=last)
    assert_same(found, wanted, range(3))
    assert found.outcomes[-1].validation == wanted.outcomes[-1].validation


@pytest.mark.parametrize("name", ["ditto", pytest.param("scaffold", marks=pytest.mark.long)])
def test_a_refused_client_goes_back_with_all_that_it_keeps(
    name: str, tiny_config: Make, play: Play
) -> None:
    def poison(plant: Plant, t: int) -> None:
        (client,) = plant._clients.members  # type: ignore[attr-defined]
        for desk in client._crews._sit(client.learners) if t == 2 else ():
            desk.scorer.prior_KI[2] = torch.nan

    train = {"rounds": 3} | METHODS[name].get("train", {})
    settings = METHODS[name] | {"train": train, "clients": {"crews": 1}, **LITTLE}
    played = play(tiny_config(**settings), before=poison, last=2)
    assert list(played.outcomes[2].reports.refused) == ["c2"]
    rule = played.config.method.local()
    for part in ("client", "trunk"):
        own = {"values", *rule.kinds} - {*rule.received}
        for kind in own:
            before, after = (page(played, t, ["c2"], part, kind) for t in (1, 2))
            assert before.any()
            assert torch.equal(before, after), "its own stays"
        for kind in rule.received:
            given, everyones = (page(played, 2, [c], part, kind) for c in ("c2", EVERYONE))
            assert torch.equal(given, everyones), "what is everyone's is its too"


def page(played: Any, round: int, clients: Sequence[str], part: str, kind: str) -> Tensor:
    name = f"{part}.{kind}"
    found: Tensor = played.rounds.load(round, clients, [name])[name]
    return found


def test_a_server_lost_between_both_trainings_replays_the_round_to_the_same_bits(
    tiny_config: Make, play: Play, plain: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    wanted = plain("ditto")
    begin, lives, standing = TrunkHost.begin, [1], []

    def strike(
        self: TrunkHost, run: str, round: int, clients: Sequence[str], twin: bool = False
    ) -> Lease:
        if lives and round == 2 and not twin:
            lives.clear()
            plant = standing[0]
            world, config = survey(plant._config), plant._config
            fresh = make_host(config, plant._learners, world.trunk_side(config), plant._rounds)
            plant._servers.pool.members[0] = fresh
            for client in plant._clients.members:
                client._span.remote._hosts, client._span.remote._host = (fresh,), fresh
            with pytest.raises(StaleLease, match="restarted") as refusal:
                begin(fresh, run, round, clients, twin)
            raise refusal.value
        return begin(self, run, round, clients, twin)

    monkeypatch.setattr(TrunkHost, "begin", strike)
    config = tiny_config(**METHODS["ditto"], **LITTLE)
    found = play(config, before=lambda plant, t: standing.append(plant))
    assert not lives
    assert found.events[2] == [
        "the round was begun again: the server was restarted during the round"
    ]
    assert_same(found, wanted, range(3))


@pytest.mark.parametrize("name", ["ditto", "scaffold"])
def test_what_a_rule_keeps_is_handed_over(name: str, plain: Play, tmp_path: Path) -> None:
    played, new = plain(name), Rounds(Storage(tmp_path))
    hand_over(played.config, played.rounds, new, 2, {})
    names = names_of(played.config)
    assert any("anchor" in one or "control" in one for one in names)
    asked = [*played.learners, "nobody yet"]
    assert new.hashes(2, names, asked) == played.rounds.hashes(2, names, asked)


# --- bytes --------------------------------------------------------------------------------------


def test_what_methods_send(plain: Play) -> None:
    """512 numbers of each of five clients: two sites in each of two blocks, rank 2, width 32."""
    whole = 5 * 512 * 4
    ditto, scaffold = (total(plain(name).ledger[2]) for name in ("ditto", "scaffold"))
    assert (ditto["adapter_up"], ditto["adapter_down"]) == (whole, whole)
    assert (scaffold["adapter_up"], scaffold["adapter_down"]) == (whole, 2 * whole)
    assert ditto["activation"] == 2 * scaffold["activation"], "two trainings"


# --- ranks and cuts of clients' own -------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["ffa_lora", "ditto", "fedamp"])
def test_own_ranks_and_cuts(name: str, tiny_config: Make, play: Play, tmp_path: Path) -> None:
    """Any grouping again; and whoever has a smaller rank has the first components."""
    own = tmp_path / "own.csv"
    own.write_text("client,rank,cut\nc1,1,2\nc3,2,3\nc4,1,1\n")
    runs = [
        play(tiny_config(**METHODS[name] | {"clients": {"own": str(own)} | more}, **LITTLE))
        for more in ({"per_actor": 5}, {"per_actor": 2, "slots": 1})
    ]
    assert_same(*runs, range(3))
    config = runs[0].config
    with Plant.inline(config, survey(config), runs[0].rounds) as plant:
        sites, r = plant._row.sites, config.model.lora.r
        rows = plant._pages.load(2, ["c0", "c1"], "values")
    if config.method.local().freezes_a:
        seeded = start(sites, config.model.lora, config.seed).repeat(2, 1)
        cut_(views(seeded, sites, r), torch.arange(2), torch.tensor([2, 1]))
        for block, columns in name_blocks(sites, r).items():
            if block.endswith("lora_B"):
                rows[:, columns] = 0.0
        assert torch.equal(rows, seeded), "A, of its own rank, by no bit another"


@pytest.mark.long
def test_scaffold_with_cuts_of_clients_own_is_scaffold(
    tiny_config: Make, play: Play, tmp_path: Path
) -> None:
    """Every block has one control variate of everyone's, whoever holds it."""
    own = tmp_path / "own.csv"
    own.write_text("client,cut\nc1,2\nc3,3\n")
    cut, same = (
        play(tiny_config(**METHODS["scaffold"], **LITTLE, clients=clients))
        for clients in ({"own": str(own)}, {})
    )
    assert_close(cut, same)


def assert_close(cut: Any, same: Any) -> None:
    found = []
    for played in (cut, same):
        config = played.config
        with Plant.inline(config, survey(config), played.rounds) as plant:
            row_P = plant._pages.load(2, ["c0"], "server_control")[0]
            blocks = {name: row_P[columns] for name, columns in plant._row.blocks.items()}
            found.append(torch.cat([blocks[name] for name in sorted(blocks)]))
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-4)
    assert found[0].abs().max() > 0.01
