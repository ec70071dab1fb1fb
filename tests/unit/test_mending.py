"""A damaged file costs its own clients a step back, by name, and nobody else a bit."""

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fellray.platform import storage as storages
from fellray.platform.errors import FellrayError
from fellray.platform.manifest import Uncommitted
from fellray.platform.messages import Damaged
from fellray.platform.page_index import EVERYONE
from fellray.platform.rounds import Rounds
from fellray.platform.storage import Storage

NAMES = ["v", "w"]
CLIENTS = list("abcd")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def flip_page(path: Path, client: str, name: str = "") -> None:
    """One bit of a client's row of a tensor, by default the first."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + length])
    clients = json.loads(tree["__metadata__"]["clients"])
    name = name or sorted(n for n in tree if n not in ("__metadata__", "digests"))[0]
    start, end = tree[name]["data_offsets"]
    size = (end - start) // len(clients)
    flip(path, 8 + length + start + size * clients.index(client) + 1)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def value(number: int, client: str) -> float:
    return 1000.0 * number + (ord(client) if client else 1)


def commit(rounds: Rounds, number: int, clients: list[str]) -> None:
    """`v` from one side of the cut, `w` from the other."""
    rows = torch.tensor([[value(number, c)] for c in clients])
    staged = [
        rounds.stage(number, "client", clients, {"v": rows}),
        rounds.stage(number, "trunk", clients, {"w": -rows}),
        rounds.stage(number, "shared", [], {"s": torch.ones(2)}),
    ]
    rounds.commit(number, staged, {"data": "x"})


def make_rounds(folder: Path) -> Rounds:
    rounds = Rounds(Storage(folder))
    commit(rounds, 0, [EVERYONE])
    for number, clients in enumerate(["abc", "ab", "cd", "a", "b", "a"], start=1):
        commit(rounds, number, list(clients))
        rounds.prune(2, [0])
    return rounds


LAST = {"a": 6, "b": 5, "c": 3, "d": 3}
"""Whose last page lies where; rounds 1 and 2 are deleted, 3 and 4 given up."""


def states(rounds: Rounds, round: int = 6) -> dict[str, int]:
    """Each client's round, the same on both sides."""
    held = rounds.load(round, CLIENTS, NAMES)
    assert torch.equal(held["v"], -held["w"])
    found = {}
    for client, v in zip(CLIENTS, held["v"].flatten().tolist(), strict=True):
        number = int(v) // 1000
        assert v in (value(number, client), value(0, EVERYONE))
        found[client] = number
    return found


def mend_all(rounds: Rounds, reader: Rounds, round: int = 6) -> list[str]:
    """What a driver does for an actor that reads."""
    events: list[str] = []
    for _ in range(10):
        try:
            states(reader, round)
        except Damaged as damage:
            mended = rounds.mend(pickle.loads(pickle.dumps(damage)))
            assert mended
            events += mended
            reader.look_again()
        else:
            return events
    raise AssertionError(events)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rounds = make_rounds(tmp_path)
    assert rounds.committed() == [0, 5, 6]
    assert rounds.page_rounds(6, CLIENTS, "v") == [6, 5, 3, 3]
    assert Storage(tmp_path).list("rounds/000003") == [
        *("client.safetensors", "pages.json", "shared.safetensors", "trunk.safetensors")
    ]
    return tmp_path


@pytest.mark.parametrize("side", ["client", "trunk"])
@pytest.mark.parametrize(
    ("number", "client", "back"), [(6, "a", 4), (5, "b", 0), (3, "c", 0), (3, "d", 0)]
)
def test_a_flipped_bit_sends_one_client_back_on_both_sides(
    side: str, number: int, client: str, back: int, folder: Path
) -> None:
    """Also in a round that was given up."""
    flip_page(folder / f"rounds/{number:06d}/{side}.safetensors", client)
    driver, actor = Rounds(Storage(folder)), Rounds(Storage(folder))
    (event,) = mend_all(driver, actor)
    assert event == (
        f"rounds/{number:06d}/{side}.safetensors is damaged: back goes client {client} to "
        f"{f'round {back}' if back else 'the start (round 0)'}"
    )
    for rounds in (driver, actor, Rounds(Storage(folder))):
        assert states(rounds) == LAST | {client: back}
        assert rounds.verdicts() == [event]


def test_back_goes_to_the_newest_round_that_is_whole(tmp_path: Path) -> None:
    rounds = Rounds(Storage(tmp_path))
    commit(rounds, 0, [EVERYONE])
    for number in range(1, 7):
        commit(rounds, number, CLIENTS)
    for number, side in [(6, "client"), (5, "trunk"), (4, "client")]:
        flip_page(tmp_path / f"rounds/{number:06d}/{side}.safetensors", "b")
    cut(tmp_path / "rounds/000003/trunk.safetensors")
    flip_page(tmp_path / "rounds/000002/client.safetensors", "c")  # nobody needs it
    driver, actor = Rounds(Storage(tmp_path)), Rounds(Storage(tmp_path))
    events = mend_all(driver, actor)
    assert [event.rpartition(" is ")[0] for event in events] == [
        "rounds/000006/client.safetensors",
        "rounds/000005/trunk.safetensors",
        "rounds/000004/client.safetensors",
        "rounds/000003/trunk.safetensors",
    ]
    assert all("back goes client b to round 2" in event for event in events)
    assert states(Rounds(Storage(tmp_path))) == {"a": 6, "b": 2, "c": 6, "d": 6}
    # what was decided holds for earlier rounds as well, and others' pages of them count
    assert states(driver, 5) == {"a": 5, "b": 2, "c": 5, "d": 5}


@pytest.mark.parametrize("harm", [cut, Path.unlink])
@pytest.mark.parametrize("side", ["client", "trunk"])
def test_a_file_that_is_cut_or_gone_sends_all_its_clients_back(
    side: str, harm: Callable[[Path], None], folder: Path
) -> None:
    harm(folder / f"rounds/000003/{side}.safetensors")
    driver, actor = Rounds(Storage(folder)), Rounds(Storage(folder))
    (event,) = mend_all(driver, actor)
    assert f"rounds/000003/{side}.safetensors is damaged" in event
    assert "clients c, d to the start" in event
    assert states(actor) == LAST | {"c": 0, "d": 0}
    commit(driver, 7, ["c"])
    driver.prune(2, [0])
    assert states(Rounds(Storage(folder)), 7) == LAST | {"c": 7, "d": 0}


def test_a_head_that_cannot_be_trusted_is_the_whole_file(folder: Path) -> None:
    flip(folder / "rounds/000003/trunk.safetensors", 20)
    driver = Rounds(Storage(folder))
    (event,) = mend_all(driver, Rounds(Storage(folder)))
    assert "clients c, d" in event


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_manifest_cut_in_half_is_made_again_and_nobody_loses(number: int, folder: Path) -> None:
    name = "pages.json" if number == 3 else "manifest.json"
    path = folder / f"rounds/{number:06d}/{name}"
    whole = json.loads(path.read_bytes())
    cut(path)
    driver, actor = Rounds(Storage(folder)), Rounds(Storage(folder))
    (event,) = mend_all(driver, actor)
    assert event.startswith(f"rounds/{number:06d}/{name} was damaged and made again")
    assert states(actor) == states(driver) == LAST
    assert json.loads(path.read_bytes()) == whole
    assert driver.committed() == [0, 5, 6]


def test_a_manifest_and_a_file_of_its_round(folder: Path) -> None:
    cut(folder / "rounds/000003/pages.json")
    cut(folder / "rounds/000003/trunk.safetensors")
    (event,) = mend_all(Rounds(Storage(folder)), Rounds(Storage(folder)))
    assert "without trunk.safetensors, which cannot be read: back goes clients c, d" in event
    assert states(Rounds(Storage(folder))) == LAST | {"c": 0, "d": 0}


def test_the_last_round_damaged_while_it_is_in_use(folder: Path) -> None:
    """A holder that was restarted reads it; the driver knows it."""
    driver = Rounds(Storage(folder))
    assert states(driver) == LAST
    cut(folder / "rounds/000006/trunk.safetensors")
    (event,) = mend_all(driver, Rounds(Storage(folder)))
    assert "client a to round 4" in event
    assert Rounds(Storage(folder)).latest() == 6
    cut(folder / "rounds/000006/manifest.json")
    actor = Rounds(Storage(folder))
    with pytest.raises(Damaged):
        states(actor)
    assert (
        Rounds(Storage(folder))
        .dropped()[0]
        .startswith(f"{folder}/rounds/000006/manifest.json: is truncated or changed")
    )


def test_everyones_page_takes_the_whole_round_back_but_not_what_was_carried(
    tmp_path: Path,
) -> None:
    rounds = Rounds(Storage(tmp_path))
    for number in range(3):
        tensors = {n: torch.full((1, 1), float(number)) for n in NAMES}
        staged = [rounds.stage(number, "everyone", [EVERYONE], tensors)]
        moments = {"m": torch.full((2, 1), float(number))}
        if number:
            staged.append(rounds.stage(number, "client", ["a", "b"], moments))
        else:
            staged.append(rounds.stage(0, "start", [EVERYONE], {"m": moments["m"][:1]}))
        if number == 2:
            staged.append(rounds.stage(2, "carried-0", ["c"], {"m": torch.full((1, 1), 7.0)}))
        rounds.commit(number, staged, {})
    flip_page(tmp_path / "rounds/000002/everyone.safetensors", EVERYONE)
    (event,) = rounds.mend(Damaged("", 2, "everyone.safetensors"))
    assert event == "rounds/000002/everyone.safetensors is damaged: back goes everyone to round 1"
    held = Rounds(Storage(tmp_path)).load(2, ["a", "b", "c"], [*NAMES, "m"])
    assert held["v"].flatten().tolist() == held["w"].flatten().tolist() == [1.0] * 3
    assert held["m"].flatten().tolist() == [1.0, 1.0, 7.0]


def test_nothing_replaces_what_belongs_to_all(folder: Path) -> None:
    driver = Rounds(Storage(folder))
    flip(folder / "rounds/000006/shared.safetensors", -40)
    with pytest.raises(Damaged, match=r"restore the file, or go back to round 5: ") as told:
        driver.load_shared(6, "s")
    with pytest.raises(Damaged, match="go back to round 5"):
        driver.mend(told.value)
    assert driver.verdicts() == []


def test_what_is_whole_and_what_is_staged_only_is_no_damage(folder: Path) -> None:
    driver = Rounds(Storage(folder))
    assert driver.mend(Damaged("seen elsewhere", 6, "client.safetensors")) == []
    driver.stage(7, "client", ["a"], {"v": torch.ones(1, 1)})
    assert driver.mend(Damaged("staged", 7, "client.safetensors")) == []
    flip_page(folder / "rounds/000006/client.safetensors", "a")
    damage = Damaged("seen twice", 6, "client.safetensors")
    assert len(driver.mend(damage)) == 1
    assert driver.mend(damage) == [], "it is decided once"


def test_a_storage_that_cannot_be_reached_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Storage, path: str, ranges: object) -> list[bytes]:
        raise FellrayError("out of reach")

    monkeypatch.setattr(Storage, "read_ranges", refuse)
    with pytest.raises(FellrayError, match="out of reach") as told:
        states(Rounds(Storage(folder)))
    assert not isinstance(told.value, Damaged)


def test_verdicts_end_with_their_round(folder: Path) -> None:
    """The last round is dropped and done again: its pages are new ones."""
    flip_page(folder / "rounds/000006/client.safetensors", "a")
    driver = Rounds(Storage(folder))
    mend_all(driver, Rounds(Storage(folder)))
    cut(folder / "rounds/000006/manifest.json")
    again = Rounds(Storage(folder))
    assert again.latest() == 5
    commit(again, 6, ["a"])
    assert again.verdicts() == []
    assert states(Rounds(Storage(folder))) == LAST


@pytest.mark.parametrize("half", [True, False])
def test_verdicts_that_are_damaged_themselves(half: bool, folder: Path) -> None:
    flip_page(folder / "rounds/000006/client.safetensors", "a")
    mend_all(Rounds(Storage(folder)), Rounds(Storage(folder)))
    path = folder / "rounds/damaged.json"
    if half:
        cut(path)
    else:
        path.write_bytes(path.read_bytes().replace(b'"a"', b'"b"'))
    with pytest.raises(FellrayError, match=r"rounds/damaged\.json: .* delete it and resume"):
        Rounds(Storage(folder)).latest()
    path.unlink()
    mend_all(Rounds(Storage(folder)), Rounds(Storage(folder)))
    assert states(Rounds(Storage(folder))) == LAST | {"a": 4}


def test_every_round_is_told_what_is_true_of_it(folder: Path) -> None:
    rounds = Rounds(Storage(folder))
    for number in (3, 4):  # given up; deleted
        with pytest.raises(Uncommitted, match=f"round {number} was pruned; `keep_last`") as told:
            rounds.load(number, ["a"], NAMES)
        assert "deleting" not in str(told.value)
        assert str(told.value).endswith("committed rounds: 0, 5, 6")
    with pytest.raises(Uncommitted, match=r"round 7 never happened; committed rounds: 0, 5, 6$"):
        rounds.load(7, ["a"], NAMES)
    flip_page(folder / "rounds/000006/client.safetensors", "a")
    with pytest.raises(
        Damaged, match=r"000006/client.*\(client 'a'\).*: 0, 5, 6: restore|0, 5: restore"
    ):
        rounds.load(6, ["a"], NAMES)


def test_a_round_costs_one_look_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is read where nothing was decided."""
    looks: list[str] = []
    exists = Storage.exists

    def count(self: Storage, path: str) -> bool:
        looks.append(path)
        return exists(self, path)

    monkeypatch.setattr(Storage, "exists", count)
    rounds = Rounds(Storage(tmp_path))
    for number in range(6):
        looks.clear()
        commit(rounds, number, ["a"])
        rounds.prune(2)
        states_of = rounds.load(number, ["a"], NAMES)
        assert states_of["v"].item() == value(number, "a")
    assert looks.count("rounds/damaged.json") == 1


class FullDisk:
    """Refuses every write after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.writes = 0
        self.room = 10**9
        for name in ("write_file", "append_to_file"):
            monkeypatch.setattr(storages, name, self._limited(getattr(storages, name)))

    def _limited(self, true: Callable[..., None]) -> Callable[..., None]:
        def write(*args: Any) -> None:
            self.writes += 1
            if self.writes > self.room:
                raise OSError(errno.ENOSPC, "full")
            true(*args)

        return write


@pytest.mark.parametrize("room", range(9))
def test_a_full_disk_loses_nothing_and_rounds_go_on(
    room: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a verdict is written, a round is staged and committed, and old ones are given up."""
    flip_page(folder / "rounds/000003/trunk.safetensors", "c")
    disk = FullDisk(monkeypatch)

    def go_on() -> None:
        rounds = Rounds(Storage(folder))
        mend_all(rounds, Rounds(Storage(folder)), rounds.latest() or 0)
        for number in range((rounds.latest() or 0) + 1, 9):
            commit(rounds, number, ["a" if number == 7 else "b"])
            rounds.prune(1, [0])

    disk.room = room
    with pytest.raises(FellrayError, match="no space is left"):
        go_on()
    disk.room = 10**9
    go_on()
    assert states(Rounds(Storage(folder)), 8) == {"a": 7, "b": 8, "c": 0, "d": 3}
