"""Fewer bytes over the cut: each switch gives one run, whatever the actors."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fellray.actors import plant as plants
from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.platform.config import RunConfig, parse
from fellray.platform.encoder import load_backbone
from fellray.platform.errors import FellrayError
from fellray.platform.host import TrunkHost
from fellray.platform.ledger import total
from fellray.platform.messages import StaleLease, Update
from fellray.platform.model_config import ModelConfig
from fellray.platform.own import read_own
from fellray.platform.split import cut_model, plan_cut

ROWS = {"keep_rows_mib": 16}
SWITCHES: dict[str, dict[str, Any]] = {
    "rows": {"wire": ROWS},
    "int8": {"wire": {"activation": "int8", "gradient": "int8"}},
    "int4": {"wire": {"activation": "int4", "gradient": "int4"}},
    "frozen": {"model": {"freeze_bottom": True}, "wire": ROWS},
    "means": {"model": {"top": 0}, "wire": {"pooled": True}},
    "all": {
        "model": {"top": 0, "freeze_bottom": True},
        "wire": {"activation": "int4", "gradient": "int8", "pooled": True, **ROWS},
    },
}
EVERYDAY = ("int8", "all")
"""The others take the same ways alone: with the long tests."""
Play = Callable[..., Any]
Make = Callable[..., RunConfig]


def each(*everyday: str) -> list[Any]:
    return [
        pytest.param(name, marks=() if name in everyday else pytest.mark.long) for name in SWITCHES
    ]


@pytest.fixture(scope="module")
def plain(tiny_config: Make, play: Play) -> Play:
    """An undisturbed run; the same settings are played once."""
    known: dict[str, Any] = {}

    def run(**overrides: Any) -> Any:
        key = json.dumps(overrides, sort_keys=True)
        if key not in known:
            known[key] = play(tiny_config(**overrides))
        return known[key]

    return run


def sent(played: Any, t: int) -> dict[str, int]:
    return total(played.ledger[t])


def same_run(one: Any, other: Any) -> bool:
    return all(
        one.hashes(t) == other.hashes(t)
        and one.outcomes[t].validation == other.outcomes[t].validation
        for t in range(3)
    )


@pytest.mark.parametrize("name", each(*EVERYDAY))
def test_any_grouping_gives_the_same_run(name: str, plain: Play) -> None:
    one, *others = (
        plain(clients={"per_actor": n, "crews": crews}, **SWITCHES[name])
        for n, crews in ((5, 2), (2, 1), (1, 1))
    )
    for other in others:
        assert same_run(one, other)
        assert one.ledger == other.ledger


@pytest.mark.parametrize("name", each())
def test_kept_or_computed_twice_and_on_several_servers(name: str, plain: Play) -> None:
    clients = {"per_actor": 2, "crews": 1}
    one = plain(clients=clients, **SWITCHES[name])
    for server in ({"keep_graphs_mib": 0}, {"count": 3}):
        other = plain(clients=clients, server=server, **SWITCHES[name])
        assert same_run(one, other)
        assert one.ledger == other.ledger


@pytest.mark.parametrize("name", each("all"))
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    name: str, tiny_config: Make, play: Play, plain: Play
) -> None:
    whole, broken = plain(clients={"crews": 2}, **SWITCHES[name]), tiny_config(**SWITCHES[name])
    play(broken, last=1)
    rest = play(broken)
    assert rest.hashes(2) == whole.hashes(2)
    assert rest.outcomes[0].validation == whole.outcomes[2].validation


@pytest.mark.parametrize("name", each("all"))
def test_a_round_that_is_begun_again_comes_to_the_same(
    name: str, tiny_config: Make, play: Play, plain: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client actor is lost at the end of round 2, and all that was in its memory."""
    sound, lost = plants.Client.fit, [False]

    def fit(self: Any, round: int, clients: Sequence[str], *more: Any) -> Update:
        update = sound(self, round, clients, *more)
        if round == 2 and not lost[0]:
            lost[0] = True
            self._span._known.forget()
            raise StaleLease("killed")
        return update

    monkeypatch.setattr(plants.Client, "fit", fit)
    found = play(tiny_config(**SWITCHES[name]))
    assert lost[0]
    assert found.events[2] == ["the round was begun again: killed"]
    assert same_run(plain(clients={"crews": 2}, **SWITCHES[name]), found)
    assert "replayed" in sent(found, 2)


def test_a_server_that_lost_its_rows_is_sent_them_again(
    tiny_config: Make, play: Play, plain: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a round, and between a step's way up and its way down."""
    wanted = plain(clients={"crews": 2}, **SWITCHES["frozen"])

    def lose(plant: Plant, t: int) -> None:
        if t == 2:
            plant._servers.pool.members[0]._recall.clear()  # type: ignore[attr-defined]

    before = play(tiny_config(**SWITCHES["frozen"]), before=lose)
    sound = TrunkHost.backward

    def backward(self: TrunkHost, asked: Any) -> Any:
        if asked[0][0].round == 2 and not len(asked[0][0].h_Ld):
            self._recall.clear()
        return sound(self, asked)

    monkeypatch.setattr(TrunkHost, "backward", backward)
    between = play(tiny_config(**SWITCHES["frozen"]))
    for found in (before, between):
        assert same_run(wanted, found)
        assert sent(found, 1) == sent(wanted, 1)
    up, again = "activation", "activation_repeat"
    assert sent(before, 2)[up] > sent(wanted, 2)[up]
    assert sent(wanted, 2).get(again, 0) == 0 < sent(between, 2)[again]


def test_rows_beyond_the_budget_are_sent_again(
    tiny_config: Make, play: Play, plain: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plain(clients={"crews": 2}, **SWITCHES["frozen"])
    config = tiny_config(**SWITCHES["frozen"])
    kept: list[int] = []

    def tighten(plant: Plant, t: int) -> None:
        recall = plant._servers.pool.members[0]._recall  # type: ignore[attr-defined]
        recall._budget = 40_000
        kept.append(recall.used)

    found = play(config, before=tighten)
    assert same_run(wanted, found)
    assert (
        max(kept) <= 40_000 < wanted.ledger[0][0].bytes + sent(wanted, 0)["evaluation_activation"]
    )
    assert sum(sent(found, 2).values()) > sum(sent(wanted, 2).values())


def test_what_each_switch_leaves_out(plain: Play) -> None:
    """Against the plain run of the same histories, in the second round."""
    runs = {n: sent(plain(clients={"crews": 2}, **s), 2) for n, s in SWITCHES.items()}
    runs["plain"] = sent(plain(clients={"crews": 2}), 2)
    kinds = ("activation", "output", "gradient", "input_gradient", "activation_repeat")
    tokens = runs["plain"]["activation"] // (32 * 4)

    def per_token(name: str) -> list[float]:
        return [runs[name].get(kind, 0) / tokens for kind in kinds]

    assert per_token("plain") == [128.0] * 5
    assert per_token("rows") == [128.0] * 4 + [0.0]
    assert per_token("int8") == [34.0] * 5
    assert per_token("int4") == [18.0] * 5
    assert per_token("frozen")[1:] == [128.0, 128.0, 0.0, 0.0]
    rows = 5 * 12
    assert [runs["means"][k] for k in ("output", "gradient")] == [rows * 128] * 2
    assert [runs["all"][k] for k in ("output", "gradient")] == [rows * 34] * 2
    # c4 has few histories, which come again and again; so do those that all are evaluated on
    for name in ("frozen", "all"):
        first = sent(plain(clients={"crews": 2}, **SWITCHES[name]), 1)
        assert runs[name].get("activation", 0) < first["activation"]
        assert runs[name].get("evaluation_activation", 0) == 0
    assert runs["all"]["envelope"] == runs["frozen"]["envelope"] > runs["plain"]["envelope"]


@pytest.mark.parametrize("name", each("all"))
def test_the_ledger_is_what_the_transport_carried(
    name: str, tiny_config: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what was sent in vain."""
    remotes: list[Any] = []

    def lose(plant: Plant, t: int) -> None:
        remotes[:] = [plant._clients.members[0]._span.remote]  # type: ignore[attr-defined]
        plant._servers.pool.members[0]._recall.clear()  # type: ignore[attr-defined]

    played = play(tiny_config(**SWITCHES[name]), before=lose)
    entered = total(row for page in played.ledger for row in page)
    own = ("adapter_up", "adapter_down", "loss")
    assert sum(n for kind, n in entered.items() if kind not in own) == remotes[0].bytes


def test_what_loses_nothing_changes_no_bit(plain: Play) -> None:
    whole = plain(clients={"crews": 2})
    assert same_run(whole, plain(clients={"crews": 2}, **SWITCHES["rows"]))
    top = plain(clients={"crews": 2}, model={"top": 0})
    assert same_run(top, plain(clients={"crews": 2}, **SWITCHES["means"]))
    assert not same_run(whole, top)


def test_what_is_rounded_trains_nearly_the_same(plain: Play) -> None:
    whole = plain(clients={"crews": 2})
    for name, apart in (("int8", 0.02), ("int4", 0.2)):
        found = plain(clients={"crews": 2}, **SWITCHES[name])
        for t in (1, 2):
            losses, wanted = found.losses(t), whole.losses(t)
            assert losses != wanted
            assert losses == pytest.approx(wanted, abs=apart)


def test_a_frozen_bottom_has_no_adapters(plain: Play, tiny_config: Make) -> None:
    config = tiny_config(**SWITCHES["frozen"])
    sites = plan_cut(survey(config).backbone, config.model).sites
    assert sites["bottom"] == []
    assert sites["trunk"]
    played = plain(clients={"crews": 2}, **SWITCHES["all"])
    values = played.rounds.load(2, played.learners, ["client.values"])["client.values"]
    assert values.shape == (5, 0), "neither bottom nor top"


@pytest.mark.parametrize("name", ["int8", pytest.param("all", marks=pytest.mark.long)])
def test_a_nan_is_refused_and_stays_with_its_client(
    name: str, tiny_config: Make, play: Play
) -> None:
    settings = {
        "method": {"kind": "local"},
        "evaluation": {"every": 9},
        **SWITCHES[name],
    }

    def poison(plant: Plant, t: int) -> None:
        if t == 1:
            (client,) = plant._clients.members  # type: ignore[attr-defined]
            for desk in client._crews._sit(client.learners):
                for place, shard in enumerate(desk.reader.shards):
                    if shard.client == "c2":
                        desk.scorer.prior_KI[place] = np.nan

    clean = play(tiny_config(**settings), last=1)
    sick = play(tiny_config(**settings), before=poison, last=1)
    assert list(sick.outcomes[1].reports.refused) == ["c2"]
    one, other = clean.hashes(1), sick.hashes(1)
    assert {c for c in one if one[c] != other[c]} == {"c2"}


# --- misuse -------------------------------------------------------------------------------------


def test_means_are_for_a_top_without_blocks() -> None:
    with pytest.raises(FellrayError, match=r"attend to every token; set model.top=0"):
        parse({"wire": {"pooled": True}}, "test")


@pytest.mark.parametrize("wrong", [{"activation": "int3"}, {"gradient": 8}, {"keep_rows_mib": -1}])
def test_forms_that_there_are_not(wrong: dict[str, Any]) -> None:
    with pytest.raises(FellrayError, match=r"wire\."):
        parse({"wire": wrong}, "test")


def test_a_frozen_bottom_and_cuts_of_ones_own(tiny_config: Make, tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("client,cut\nc0,2\n")
    config = tiny_config(model={"freeze_bottom": True}, clients={"own": str(file)})
    with pytest.raises(FellrayError, match=r"own.csv.*model.freeze_bottom=false"):
        read_own(config)


def test_a_message_in_another_form_is_refused(tiny_config: Make, play: Play) -> None:
    """A client of a float32 run asks the server of an int8 one."""
    played = play(tiny_config(**SWITCHES["int8"]), last=0)
    with Plant.inline(played.config, survey(played.config), played.rounds) as plant:
        (client,) = plant._clients.members  # type: ignore[attr-defined]
        other = tiny_config()
        client._crews._wire = type(client._crews._wire)(other, 32)
        with pytest.raises(FellrayError, match=r"does not add up"):
            client.fit(1, client.learners)


@pytest.mark.parametrize(("top", "distinct"), [(0, 1), (1, 5), (2, 5)])
def test_what_a_top_looks_at(top: int, distinct: int, tiny_encoder: Path) -> None:
    """Without blocks at the mean only, so that all five tokens have one gradient; a block attends
    to each, and no token's hidden state or gradient follows from the others'."""
    model = ModelConfig(name=str(tiny_encoder), top=top)
    h_nTd = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ends = cut_model(load_backbone(model.name), model)
    u_nd = ends.top(h_nTd, torch.ones(1, 5, dtype=torch.bool), ())
    u_nd[0, 0].backward()
    assert h_nTd.grad is not None
    assert len(h_nTd.grad[0].unique(dim=0)) == distinct
    assert torch.linalg.matrix_rank(h_nTd.grad[0]) == distinct
