"""Rounds that ask a sample: who is absent keeps every byte, and who sits where changes no bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fellray.platform.config import RunConfig
from fellray.platform.rounds import EVERYONE
from fellray.platform.storage import Storage

Make = Callable[..., RunConfig]
Play = Callable[..., Any]
BOTH = ("client.values", "trunk.values")


def sampled(make: Make, **more: Any) -> RunConfig:
    train = {"rounds": 4, **more.pop("train", {})}
    return make(sampling={"per_round": 2}, train=train, keep_last=5, **more)


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_the_absent_keep_every_byte_and_cost_no_page(
    moments: str, tiny_config: Make, play: Play
) -> None:
    played = play(sampled(tiny_config, train={"moments": moments}))
    before = played.hashes(0)
    for t in range(1, 5):
        present = played.outcomes[t].reports.meta.clients
        assert len(present) == 2
        now = played.hashes(t)
        assert {c for c in now if now[c] != before[c]} == set(present)
        staged = {c for one in played.outcomes[t].staged for c in one.clients}
        assert staged == set(present)
        before = now
    assert len({o.reports.meta.clients for o in played.outcomes[1:]}) > 1


@pytest.mark.parametrize(
    "clients",
    [
        {"per_actor": 2, "slots": 1},
        pytest.param({"per_actor": 1}, marks=pytest.mark.long),
        pytest.param({"per_actor": 5, "slots": 1}, marks=pytest.mark.long),
    ],
    ids=["one after the other in pairs", "alone", "one after the other"],
)
@pytest.mark.parametrize("method", ["fellrec", "fedavg"])
def test_seats_and_slots_change_no_bit(
    clients: dict[str, int], method: str, tiny_config: Make, play: Play
) -> None:
    kind = {"kind": method}
    wanted = play(sampled(tiny_config, method=kind, clients={"per_actor": 5}))
    found = play(sampled(tiny_config, method=kind, clients=clients))
    assert found.hashes(4) == wanted.hashes(4)
    assert [o.validation for o in found.outcomes] == [o.validation for o in wanted.outcomes]


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_many_clients_lie_in_several_files(
    moments: str, tiny_config: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(train={"rounds": 2, "moments": moments}, clients={"per_actor": 5})
    whole = play(config)
    monkeypatch.setattr("fellray.platform.slots.WRITTEN", 2)
    monkeypatch.setattr("fellray.platform.sent_pages.WRITTEN", 2)
    parts = play(tiny_config(train={"rounds": 2, "moments": moments}, clients={"per_actor": 5}))
    assert parts.hashes(2) == whole.hashes(2)
    assert max(len(one.clients) for one in parts.outcomes[2].staged) == 2
    assert max(len(one.clients) for one in whole.outcomes[2].staged) == 5


def test_an_average_is_everyones(tiny_config: Make, play: Play) -> None:
    """FedAvg: who was absent starts from the average too, and no client has a page of its own."""
    played = play(sampled(tiny_config, method={"kind": "fedavg"}))
    for t in range(1, 5):
        assert {c for one in played.outcomes[t].staged for c in one.clients} == {EVERYONE}
        assert len({*played.hashes(t).values()}) == 1
        reports = played.outcomes[t].reports
        mean = reports.theta_CP.double().mean(0)
        held = played.rounds.load(t, ["c0"], BOTH)
        theta = torch.cat([held[name] for name in BOTH], dim=1)[0]
        torch.testing.assert_close(theta.double(), mean, atol=1e-6, rtol=0)


def test_an_interrupted_sampled_run_goes_on_to_the_same_bytes(
    tiny_config: Make, play: Play
) -> None:
    whole = play(sampled(tiny_config, train={"moments": "keep"}))
    broken = sampled(tiny_config, train={"moments": "keep"})
    play(broken, last=2)
    rest = play(broken)
    assert rest.hashes(4) == whole.hashes(4)


def test_old_pages_stay_as_long_as_they_are_somebodys(tiny_config: Make, play: Play) -> None:
    played = play(sampled(tiny_config, train={"rounds": 6}))
    rounds, clients = played.rounds, played.learners
    last, start = played.hashes(6), played.hashes(0)
    rounds.prune(1, keep=[0])
    assert rounds.committed() == [0, 6]
    again = type(rounds)(Storage(played.config.storage).sub(played.config.name))
    assert again.hashes(6, BOTH, clients) == last
    assert again.hashes(0, BOTH, clients) == start
    at = set(again.page_rounds(6, clients, "client.values"))
    folders = Storage(played.config.storage).sub(played.config.name).list("rounds")
    assert {int(name) for name in folders} == at | {0, 6}


def test_late_answers_are_dropped_by_name(
    tiny_config: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four are asked, the first two count; the others' round never happened."""
    rule = {"per_round": 2, "over_select": 2.0}
    config = tiny_config(sampling=rule, clients={"per_actor": 5, "slots": 1}, train={"rounds": 2})
    played = play(config)
    for t in (1, 2):
        reports = played.outcomes[t].reports
        assert len(reports.late) == 2
        assert len(reports.meta.clients) == 2
        assert not set(reports.late) & set(reports.meta.clients)
        before, now = played.hashes(t - 1), played.hashes(t)
        assert {c for c in now if now[c] != before[c]} == set(reports.meta.clients)
        assert f"round {t}: 2 of 4 were late" in played.events[t]


def test_nobody_in_time_is_a_round_in_which_nothing_happened(tiny_config: Make, play: Play) -> None:
    rule = {"per_round": 2, "deadline_s": 1e-6}
    played = play(tiny_config(sampling=rule, train={"rounds": 1}))
    assert played.outcomes[1].reports.meta.clients == ()
    assert len(played.outcomes[1].reports.late) == 2
    assert played.hashes(1) == played.hashes(0)
