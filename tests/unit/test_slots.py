"""Slots hold who takes part, and nobody else for longer than there is room."""

import threading
from pathlib import Path

import pytest
import torch

from fellray.platform.adapters import Site
from fellray.platform.bank import Bank
from fellray.platform.errors import FellrayError
from fellray.platform.local import LocalRule
from fellray.platform.messages import Damaged
from fellray.platform.model_config import LoraSpec
from fellray.platform.own import ALIKE, Own
from fellray.platform.rounds import Rounds
from fellray.platform.slots import Slots
from fellray.platform.storage import Storage
from fellray.platform.train_config import TrainConfig

SITES = [Site("one", 2, 3)]
SEEDED = torch.arange(5.0)


def make_slots(
    folder: Path, moments: bool = False, r: int = 1, own: Own = ALIKE
) -> tuple[Slots, Rounds]:
    rounds = Rounds(Storage(folder))
    slots = Slots(
        lambda n: Bank(SITES, LoraSpec(r=r), TrainConfig(), n), "client", moments, rounds, own
    )
    rounds.commit(0, slots.stage_start(SEEDED if r == 1 else torch.arange(1.0, 5 * r + 1)), {})
    return slots, rounds


@pytest.mark.parametrize("values", [True, False])
def test_who_trained_and_was_not_counted_keeps_no_row(
    values: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fellray.platform.slots.KEPT", 4)
    slots, rounds = make_slots(tmp_path)
    for number in range(1, 20):
        clients = [f"{number}{place}" for place in "abc"]
        slots.hold(number - 1, clients)
        slots.train(clients)
        staged = slots.stage(number, "h", clients[:2], values)
        assert len(staged) == values
        slots.release()
        rounds.commit(number, staged, {})
    assert len(slots.bank.values_SP) <= 4 + 3


def test_an_average_is_read_from_everyones_page(tmp_path: Path) -> None:
    slots, rounds = make_slots(tmp_path)
    rows = slots.hold(0, ["a", "b"])
    slots.train(["a", "b"])
    slots.bank.values_SP[rows] += 1
    assert slots.stage(1, "h", ["a", "b"], False) == ()
    slots.release()
    average = rounds.stage(1, "everyone", [""], {"client.values": SEEDED[None] + 7})
    rounds.commit(1, [average], {})
    rows = slots.hold(1, ["c", "b", "a"])
    assert torch.equal(slots.bank.values_SP[rows], (SEEDED + 7).expand(3, -1))


def test_pages_of_many_lie_in_files_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fellray.platform.slots.WRITTEN", 2)
    slots, rounds = make_slots(tmp_path, moments=True)
    clients = list("abcde")
    rows = slots.hold(0, clients)
    slots.bank.values_SP[rows] += torch.arange(5.0)[:, None]
    slots.bank.steps_S[rows] = torch.arange(5)
    staged = slots.stage(1, "h", clients, True)
    assert [one.clients for one in staged] == [("a", "b"), ("c", "d"), ("e",)]
    rounds.commit(1, staged, {})
    loaded = rounds.load(1, ["e", "b"], ["client.values", "client.steps"])
    assert torch.equal(loaded["client.values"], SEEDED + torch.tensor([[4.0], [1.0]]))
    assert loaded["client.steps"].tolist() == [4, 1]


def test_a_row_has_the_rank_of_who_stands_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after others stood there, and after the bank has grown."""
    monkeypatch.setattr("fellray.platform.slots.KEPT", 2)
    slots, _ = make_slots(tmp_path, r=2, own=Own({"a": 1, "b": 2}))
    whole = [float(i) for i in range(1, 11)]
    # A is 2 x 2, B is 3 x 2: the first component is A's first row and B's first column
    first = [1.0, 2.0, 0.0, 0.0, 5.0, 0.0, 7.0, 0.0, 9.0, 0.0]
    for clients in (["a"], ["b", "c"], ["d", "a"], ["c", "d"], ["a", "b", "c", "d"], ["e", "a"]):
        rows = slots.hold(0, clients)
        for row, client in zip(rows.tolist(), clients, strict=True):
            assert slots.bank.values_SP[row].tolist() == (first if client == "a" else whole)
            assert slots.bank.ranks_S[row] == (1 if client == "a" else 2)


def test_who_has_finished_needs_no_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fellray.platform.slots.KEPT", 4)
    monkeypatch.setattr("fellray.platform.slots.WRITTEN", 3)
    slots, rounds = make_slots(tmp_path)
    clients = [f"{i:02d}" for i in range(12)]
    for few in (clients[:2], clients[2:4], clients[4:6], clients[6:8], clients[8:10], clients[10:]):
        rows = slots.hold(0, few)
        slots.train(few)
        slots.bank.values_SP[rows] += torch.tensor([[float(c)] for c in few])
        slots.finish(few)
        slots.finish(few)
    assert len(slots.bank.values_SP) <= 4
    trained = SEEDED + torch.arange(12.0)[:, None]
    assert torch.equal(slots.values(clients), trained)
    slots.replace(clients[:1], SEEDED[None] + 100)
    trained[0] = SEEDED + 100
    rounds.commit(1, slots.stage(1, "h", clients, True), {})
    slots.release()
    assert len(slots.bank.values_SP) <= 4
    assert torch.equal(rounds.load(1, clients, ["client.values"])["client.values"], trained)
    assert not slots.have_finished(clients[:1])
    for few in (clients[:4], clients[8:]):
        assert torch.equal(slots.bank.values_SP[slots.hold(1, few)], trained[list(map(int, few))])


def test_who_cannot_be_read_takes_nobodys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, rounds = make_slots(tmp_path)
    slots._kept = 2
    slots.hold(0, ["a", "b"])

    def fail(*_: object) -> None:
        raise FellrayError("damaged")

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "load", fail)
        for client in ("x", "y", "z"):
            with pytest.raises(FellrayError, match="damaged"):
                slots.hold(0, [client, "b"])
    assert len(slots.bank.values_SP) == 2
    loaded = slots.loaded
    slots.hold(0, ["b"])
    assert slots.loaded == loaded
    assert slots.hold(0, ["a", "b"]).unique().tolist() == [0, 1]


def test_who_trains_again_has_not_finished(tmp_path: Path) -> None:
    slots, _ = make_slots(tmp_path)
    rows = slots.hold(0, ["a"])
    slots.train(["a"])
    slots.bank.values_SP[rows] += 1
    slots.finish(["a"])
    again = slots.hold(0, ["a"])
    slots.train(["a"])
    assert not slots.have_finished(["a"])
    assert torch.equal(slots.bank.values_SP[again], SEEDED[None])
    assert torch.equal(slots.values(["a"]), SEEDED[None])


def test_a_bank_that_grows_keeps_everyones_rank(tmp_path: Path) -> None:
    slots, _ = make_slots(tmp_path, r=2, own=Own({"a": 1}))
    slots.hold(0, ["a"])
    slots.hold(0, ["b", "c", "d"])
    assert slots.bank.ranks_S[slots.hold(0, ["a", "b", "c", "d"])].tolist() == [1, 2, 2, 2]


def test_a_bank_that_grows_knows_what_is_being_trained(tmp_path: Path) -> None:
    """Whoever begins later does not change where others are pulled to."""
    rounds, rule = Rounds(Storage(tmp_path)), LocalRule(pull=0.5)
    train = TrainConfig(optimizer="sgd", learning_rate=1.0)
    slots = Slots(
        lambda n: Bank(SITES, LoraSpec(r=1), train, n, rule=rule), "client", False, rounds
    )
    rounds.commit(0, slots.stage_start(SEEDED), {})
    for few in (["a"], ["b", "c", "d"]):
        rows = slots.hold(0, few)
        slots.train(few)
        slots.bank.values_SP[rows] += 4
    slots.bank.step(slots.find(list("abcd")))
    assert torch.equal(slots.values(list("abcd")), (SEEDED + 2).expand(4, -1))


def test_an_anchor_trains_before_the_values(tmp_path: Path) -> None:
    rounds, rule = Rounds(Storage(tmp_path)), LocalRule(pull=0.5, anchored=True, twin=True)
    train = TrainConfig(optimizer="sgd", learning_rate=1.0)
    slots = Slots(
        lambda n: Bank(SITES, LoraSpec(r=1), train, n, rule=rule), "client", False, rounds
    )
    rounds.commit(0, slots.stage_start(SEEDED), {})
    moved = {True: 8.0, False: 4.0}
    for twin, by in moved.items():
        rows = slots.hold(0, ["a"])
        slots.train(["a"], twin)
        slots.bank.values_SP[rows] += by
        slots.bank.step(rows)
        slots.finish(["a"])
        assert slots.have_finished(["a"]) != twin
    sent, finite = slots.report(["a"])
    assert torch.equal(sent[0], SEEDED + 8), "nothing pulls it"
    assert torch.equal(slots.values(["a"])[0], SEEDED + 2), "to the anchor as it was"
    assert finite == [True]
    slots.replace(["a"], SEEDED[None] + 7)
    rounds.commit(1, slots.stage(1, "h", ["a"], True), {})
    loaded = rounds.load(1, ["a"], ["client.values", "client.anchor"])
    assert torch.equal(loaded["client.values"][0], SEEDED + 2)
    assert torch.equal(loaded["client.anchor"][0], SEEDED + 7)
    slots.hold(1, ["a"])
    slots.train(["a"], True)
    assert not slots.have_twins(["a"])
    slots.release()
    assert not slots.have_twins(["a"]), "and is forgotten with the round"


def test_what_was_fetched_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, rounds = make_slots(tmp_path)
    slots.hold(0, list("abc"))
    own = torch.arange(3.0)[:, None]
    pages = {"client.values": SEEDED + own}
    rounds.commit(1, [rounds.stage(1, "h", list("abc"), pages)], {})
    read: list[tuple[str, int, list[str]]] = []
    load = Rounds.load

    def count(self: Rounds, round: int, clients: list[str], names: list[str]) -> object:
        read.append((threading.current_thread().name, round, clients))
        return load(self, round, clients, names)

    monkeypatch.setattr(Rounds, "load", count)
    slots.fetch(1, ["a", "b"])
    rows = slots.hold(1, ["b", "c", "a"])
    assert torch.equal(slots.bank.values_SP[rows], SEEDED + own[[1, 2, 0]])
    assert [one[1:] for one in read] == [(1, ["a", "b"]), (1, ["c"])]
    assert read[0][0].startswith("pages")
    assert read[1][0] == "MainThread"
    # what is there already is not fetched, and a page that is no longer the state is not taken
    slots.fetch(1, ["a"])
    assert len(read) == 2
    slots.fetch(0, ["a"])
    rows = slots.hold(1, ["a"])
    assert torch.equal(slots.bank.values_SP[rows], SEEDED[None])
    slots.fetch(0, ["a"])
    slots.clear()
    assert torch.equal(slots.bank.values_SP[slots.hold(1, ["a"])], SEEDED[None])


def test_what_cannot_be_fetched_is_said_when_it_is_asked_for(tmp_path: Path) -> None:
    slots, rounds = make_slots(tmp_path)
    staged = rounds.stage(1, "h", ["a"], {"client.values": SEEDED[None]})
    rounds.commit(1, [staged], {})
    file = tmp_path / "rounds/000001" / staged.file
    file.write_bytes(file.read_bytes().replace(SEEDED.numpy().tobytes(), bytes(20)))
    slots.fetch(1, ["a"])
    with pytest.raises(Damaged, match="is not what was written"):
        slots.hold(1, ["a"])


def test_files_are_written_beside_other_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of their names, all of them before anybody is told; a refusal is told too."""
    monkeypatch.setattr("fellray.platform.slots.WRITTEN", 1)
    slots, _ = make_slots(tmp_path)
    threads, write = [], Storage.write

    def note(self: Storage, path: str, data: bytes) -> None:
        threads.append(threading.current_thread().name)
        if len(threads) == 3:
            raise FellrayError("the disk is full")
        write(self, path, data)

    monkeypatch.setattr(Storage, "write", note)
    slots.hold(0, list("abc"))
    with pytest.raises(FellrayError, match="the disk is full"):
        slots.stage(1, "h", list("abc"), True)
    assert len(threads) == 3
    assert all(name.startswith("pages") for name in threads)
    assert sorted(file.name for file in (tmp_path / "rounds/000001").iterdir()) == [
        "h-1.safetensors",
        "h.safetensors",
    ]
