"""A run whose storage is damaged or full goes on: who went back is named, all others keep bits."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_mending import FullDisk, cut, flip, flip_page

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.display import Display
from fellray.jobs.finish import finish
from fellray.jobs.train import one_round
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.faults import TRIES
from fellray.platform.messages import Damaged
from fellray.platform.page_index import EVERYONE
from fellray.platform.rounds import Rounds
from fellray.platform.run import open_run
from fellray.platform.storage import Storage

Make = Callable[..., RunConfig]
BOTH = ("client.values", "trunk.values")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


def files_of(config: RunConfig, round: int, client: str, name: str) -> Path:
    rounds = Rounds(Storage(config.storage).sub(config.name))
    (at,) = rounds.page_rounds(round, [client], name)
    folder = Path(config.storage, config.name, f"rounds/{at:06d}")
    part = name.partition(".")[0]
    return next(
        path
        for path in sorted(folder.glob("*.safetensors"))
        if f"{part}.".encode() in path.read_bytes()[:2000]
        and f'\\"{client}\\"'.encode() in path.read_bytes()[:4000]
    )


def train(config: RunConfig, last: int | None = None) -> list[list[str]]:
    """As `jobs.train`, in this process; the events of each round, `last` is the last to be done."""
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        Plant.inline(config, world, run.rounds) as plant,
    ):
        events = []
        for t in run.to_go():
            if last is not None and t > last:
                break
            outcome = plant.replayed(one_round, t, config)
            row = run.commit(t, outcome, plant.close_ledger(), plant.take_events())
            events.append(row["events"])
        return events


def hashes(config: RunConfig, round: int) -> dict[str, str]:
    rounds = Rounds(Storage(config.storage).sub(config.name))
    return rounds.hashes(round, BOTH, [f"c{i}" for i in range(5)])


def local(make: Make, **more: Any) -> RunConfig:
    more["train"] = {"rounds": 4, "moments": "keep", **more.get("train", {})}
    more["evaluation"] = {"every": 9, **more.get("evaluation", {})}
    more["keep_last"] = more.get("keep_last", 9)
    return make(method={"kind": "local"}, clients={"per_actor": 2}, **more)


@pytest.fixture(scope="module")
def undisturbed(tiny_config: Make) -> RunConfig:
    config = local(tiny_config)
    train(config)
    return config


@pytest.mark.parametrize("name", BOTH)
def test_a_run_goes_on_without_one_client_s_last_round(
    name: str, tiny_config: Make, undisturbed: RunConfig
) -> None:
    config = local(tiny_config)
    train(config, last=2)
    path = files_of(config, 2, "c2", name)
    flip_page(path, "c2")
    # the plant forgets nothing before it reads: both sides of c2 must go back
    (event,), *later = train(config, last=3)
    relative = path.relative_to(Path(config.storage, config.name))
    assert event == f"{relative} is damaged: back goes client c2 to round 1"
    assert later == []
    ours, theirs = hashes(config, 3), hashes(undisturbed, 3)
    assert hashes(config, 2)["c2"] == hashes(undisturbed, 1)["c2"]
    assert {c for c in ours if ours[c] != theirs[c]} == {"c2"}
    assert train(config) == [[]], "it stays so, and is said once"
    assert {c for c in ours if hashes(config, 4)[c] != hashes(undisturbed, 4)[c]} == {"c2"}


def test_which_process_reads_first_changes_no_bit(tiny_config: Make) -> None:
    """Damaged while the run goes on, or found at its beginning."""
    found = []
    for resumed in (True, False):
        config = local(tiny_config)
        if resumed:
            train(config, last=2)
            flip_page(files_of(config, 2, "c2", "trunk.values"), "c2")
            train(config)
        else:
            world = survey(config)
            with (
                open_run(config, world.data_sha256) as run,
                Plant.inline(config, world, run.rounds) as plant,
            ):
                for t in run.to_go():
                    if t == 3:
                        flip_page(files_of(config, 2, "c2", "trunk.values"), "c2")
                        plant._clients.map("forget")
                        plant._servers.forget()
                    outcome = plant.replayed(one_round, t, config)
                    run.commit(t, outcome, plant.close_ledger(), plant.take_events())
        found.append([hashes(config, t) for t in (2, 3, 4)])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        pytest.param("start-client", cut, id="client", marks=pytest.mark.long),
        pytest.param("start-trunk", lambda path: flip(path, -3), id="trunk"),
        pytest.param("manifest", cut, id="manifest", marks=pytest.mark.long),
    ],
)
def test_the_start_is_made_again(
    file: str, harm: Callable[[Path], None], tiny_config: Make, undisturbed: RunConfig
) -> None:
    config = local(tiny_config)
    train(config, last=1)
    (path,) = Path(config.storage, config.name, "rounds/000000").glob(f"{file}.*")
    whole = path.read_bytes()
    harm(path)
    train(config)
    summary = conclude(config)
    assert "was damaged" in "".join(summary["events"])
    assert path.read_bytes() == whole
    for t in (0, 3, 4):
        assert hashes(config, t) == hashes(undisturbed, t)


def conclude(config: RunConfig) -> dict[str, Any]:
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        Plant.inline(config, world, run.rounds) as plant,
        Display(config, "", run.to_go(), run.events) as display,
    ):
        return finish(run, plant, world, display)


def test_the_end_of_a_run_survives_and_says_it(tiny_config: Make) -> None:
    config = local(tiny_config)
    train(config)
    flip_page(files_of(config, 4, "c1", "client.values"), "c1", "client.values")
    first = conclude(config)
    (event,) = first["events"]
    assert "back goes client c1 to round 3" in event
    again = conclude(config)
    assert again["events"] == [event]
    assert again["hashes"] == first["hashes"]
    assert again["final_hashes"] == first["final_hashes"]


@pytest.mark.parametrize("file", ["manifest.json", "trunk-00000.safetensors"])
def test_a_last_round_that_is_dropped_is_said(
    file: str, tiny_config: Make, undisturbed: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = local(tiny_config)
    train(config, last=3)
    cut(Path(config.storage, config.name, "rounds/000003", file))
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        Display(config, "", run.to_go(), run.events),
    ):
        assert run.to_go()[0] == 3
    assert f"000003/{file}" in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    (event,), *rest = train(config)
    assert f"rounds/000003/{file}: " in event
    assert event.endswith("; the round is done again")
    assert rest == [[]]
    assert hashes(config, 4) == hashes(undisturbed, 4)


def test_everyone_goes_back_to_the_average_before(tiny_config: Make) -> None:
    settings = {"method": {"kind": "fedavg"}, "sampling": {"per_round": 2}, "keep_last": 3}
    config = tiny_config(train={"rounds": 3}, **settings)
    train(config, last=2)
    before = hashes(config, 1)
    flip_page(Path(config.storage, config.name, "rounds/000002/everyone.safetensors"), EVERYONE)
    ((event,),) = train(config)
    assert event.endswith("back goes everyone to round 1")
    assert hashes(config, 2) == before
    assert len({*hashes(config, 3).values()}) == 1


def test_a_page_that_only_the_holders_find_damaged_ends_the_run(
    tiny_config: Make,
) -> None:
    config = local(tiny_config)
    train(config, last=0)
    rounds, tries = Rounds(Storage(config.storage).sub(config.name)), []

    def flicker(plant: Plant) -> None:
        tries.append(1)
        raise Damaged("trunk.safetensors: flickers", 0, "start-trunk.safetensors")

    with (
        Plant.inline(config, survey(config), rounds) as plant,
        pytest.raises(FellrayError, match=r"flickers; `fellray train` resumes the run"),
    ):
        plant.replayed(flicker)
    assert len(tries) == TRIES


def test_a_storage_that_spoils_every_page_comes_to_an_end(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is read of trained rounds is wrong: everyone is back at the start, again and again,
    and each page is decided on once."""
    config = local(tiny_config)
    train(config, last=2)
    read = Storage.read_ranges

    def spoil(self: Storage, path: str, ranges: Any) -> list[memoryview]:
        found = read(self, path, ranges)
        if "rounds/000000" in path:
            return found
        return [memoryview(bytearray(b ^ 1 for b in data)) for data in found]

    monkeypatch.setattr(Storage, "read_ranges", spoil)
    events = train(config)
    monkeypatch.undo()
    told = [event for of_round in events for event in of_round if "is damaged" in event]
    assert len(told) == len(set(told))
    assert sum(" to the start (round 0)" in event for event in told) >= 3


def go_on_after_a_full_disk(
    make: Make, monkeypatch: pytest.MonkeyPatch, choose: Callable[[int], range]
) -> None:
    settings = {"train": {"rounds": 2}, "keep_last": 1}
    disk = FullDisk(monkeypatch)
    whole = local(make, **settings)
    train(whole)
    wanted, needed = hashes(whole, 2), disk.writes
    assert needed > 15
    for room in choose(needed):
        config = local(make, **settings)
        disk.writes, disk.room = 0, room
        with pytest.raises(FellrayError, match="no space is left"):
            train(config)
        disk.room = 10**9
        train(config)
        assert hashes(config, 2) == wanted, room
        rows = Path(config.storage, config.name, "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["round"] for row in rows] == [0, 1, 2]


def test_a_full_disk_leaves_a_run_that_goes_on(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on_after_a_full_disk(tiny_config, monkeypatch, lambda n: range(n - 6, n, 3))


@pytest.mark.long
def test_a_disk_that_is_full_at_any_write_leaves_a_run_that_goes_on(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on_after_a_full_disk(tiny_config, monkeypatch, range)
