"""`fellray continue` in this process: what it takes, what it refuses, and what a kill leaves."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fellray.actors.plant import Plant
from fellray.jobs import opening
from fellray.jobs import train as training
from fellray.jobs.continuation import continue_run
from fellray.platform.additions import Batch, list_batches, write_batch
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.events import Event, EventLog
from fellray.platform.extension import taken_of
from fellray.platform.intake import add_events
from fellray.platform.origin import Continuation, Origin, read_continuation, read_origin
from fellray.platform.promotion import promote
from fellray.platform.run import Run, read_run
from fellray.platform.shard import LATER
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.platform.summary import HASHED
from fellray.serve.args import Args
from fellray.serve.blends import Blends
from fellray.serve.listings import NewItem
from fellray.serve.schema import ByUser, NewEvent, Receipt
from fellray.serve.whole import open_whole


class Quiet:
    """`RunTelemetry` without Ray."""

    def __init__(self, config: RunConfig, registered: int):
        pass

    def show(self, row: Any) -> None:
        pass


@contextmanager
def inline() -> Iterator[None]:
    """`train` itself, over actors in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plant, "on_ray", Plant.inline)
        patch.setattr(opening, "connect", lambda *_: nullcontext())
        patch.setattr(training, "RunTelemetry", Quiet)
        patch.setattr(
            "fellray.jobs.finish.export", lambda *_: None
        )  # seconds, and no question here
        yield


@pytest.fixture(autouse=True)
def _inline() -> Iterator[None]:
    with inline():
        yield


def finish(config: RunConfig, tiny_data: Path) -> Path:
    """A finished run with its data beside it: `runs/tiny`, `data/prepared`."""
    place = Path(config.storage)
    shutil.copytree(tiny_data, place / "data" / "prepared")
    data = config.data.model_copy(update={"path": place / "data" / "prepared"})
    with inline():
        training.train(config.model_copy(update={"storage": str(place / "runs"), "data": data}))
    return place


@pytest.fixture(scope="module")
def finished(tiny_config: Callable[..., RunConfig], tiny_data: Path) -> Path:
    return finish(tiny_config(), tiny_data)


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """The same, of one's own."""
    shutil.copytree(finished, tmp_path / "place")
    config = tmp_path / "place" / "runs" / "tiny" / "config.json"
    config.write_text(config.read_text().replace(str(finished), str(tmp_path / "place")))
    return tmp_path / "place"


def send(place: Path, client: str, count: int, first: int = 0) -> list[Event]:
    """Events as the service stores them: of all the client's users in turn, newest first."""
    data = Dataset(place / "data" / "prepared")
    users, items = data.shard(client).users, data.item_ids
    events = [
        Event(f"e{n}", int(users[n % len(users)]), int(items[7 * n % len(items)]), 10**9 - n)
        for n in range(first, first + count)
    ]
    log = EventLog(str(place / "runs" / "tiny" / "events" / f"{client}.jsonl"))
    add_events([[(client, event) for event in events]] * 2, {client: log})
    return events


def added(data: Dataset, client: str) -> list[tuple[int, int]]:
    """User and item of what is in a client's shard since it was first prepared, sorted."""
    shard = data.shard(client)
    user_N = np.repeat(shard.users, np.diff(shard.offsets))
    later = shard.splits == LATER
    ids = data.item_ids[shard.items[later]]
    return sorted(zip(user_N[later].tolist(), ids.tolist(), strict=True))


def pairs(events: list[Event]) -> list[tuple[int, int]]:
    return sorted((event.user_id, event.item_id) for event in events)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "locks" not in file.parts
    }


def states(run: Run, round: int, names: list[str]) -> dict[str, bytes]:
    clients = sorted(Dataset(run.config.data.path).clients)
    return {k: t.numpy().tobytes() for k, t in run.rounds.load(round, clients, names).items()}


def test_each_event_is_trained_on_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, old = place / "runs", read_run(f"{place}/runs/tiny")
    events = {"c0": send(place, "c0", 9), "c3": send(place, "c3", 4)}
    before = contents(runs / "tiny")
    best = old.best_round()
    summary = continue_run(str(runs / "tiny"), 2)
    assert "13 new events of 2 clients are training interactions in" in capsys.readouterr().out
    after = contents(runs / "tiny")
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"continuation.json"}

    new = read_run(str(runs / "tiny-1"))
    data = Dataset(place / "data" / "tiny-1")
    assert {c: added(data, c) for c in data.clients} == {
        c: pairs(events.get(c, [])) for c in data.clients
    }
    assert {c: taken.count for c, taken in taken_of(data).items()} == {"c0": 9, "c3": 4}
    assert summary["data"]["counts"]["train"] == old_counts(place)["train"] + 13
    assert [summary["data"]["counts"][k] for k in ("valid", "test")] == [
        old_counts(place)[k] for k in ("valid", "test")
    ]
    assert new.rounds.committed()[0] == 0
    assert new.rounds.committed()[-1] == new.config.train.rounds == best + 2
    rows = new.journal.rows("metrics")
    assert [row["round"] for row in rows] == [best, best + 1, best + 2]
    assert all(row["validation"]["ndcg@10"] >= 0 for row in rows)
    assert states(new, 0, HASHED) == states(old, 0, HASHED)
    assert read_origin(new.storage) == Origin("tiny", best, "tiny")
    assert read_continuation(old.storage) == Continuation("tiny-1", best, 2)
    assert summary["run"] == "tiny-1"
    assert summary["best_round"] in (best, best + 1, best + 2)
    assert (runs / "tiny-1" / "report.html").exists()


def old_counts(place: Path) -> dict[str, int]:
    counts: dict[str, int] = Dataset(place / "data" / "prepared").manifest["counts"]
    return counts


def test_no_event_is_taken_twice(place: Path) -> None:
    runs = place / "runs"
    send(place, "c0", 5)
    continue_run(str(runs / "tiny"))
    with pytest.raises(FellrayError, match=r"was continued as tiny-1, .* `fellray continue .*-1`"):
        continue_run(str(runs / "tiny"))
    with pytest.raises(
        FellrayError, match=r"holds no events after the 5 that .*tiny-1 was trained"
    ):
        continue_run(str(runs / "tiny-1"))
    assert read_continuation(Storage(runs / "tiny-1")) is None
    more = {"c0": send(place, "c0", 3, 5), "c1": send(place, "c1", 2)}
    (runs / "tiny-2").mkdir()
    (runs / "tiny-2" / "notes").write_text("a name that is taken is left alone")
    (place / "data" / "tiny-3").mkdir()
    continue_run(str(runs / "tiny-1"))
    data = Dataset(place / "data" / "tiny-4")
    assert taken_of(data)["c0"].count == 8
    assert len(added(data, "c0")) == 8
    assert added(data, "c1") == pairs(more["c1"])
    assert read_origin(Storage(runs / "tiny-4")) == Origin(
        "tiny-1", read_run(str(runs / "tiny-1")).best_round(), "tiny"
    )


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    tiny = place / "runs" / "tiny"

    def refused(words: str, run: Path = tiny, **settings: Any) -> None:
        with pytest.raises(FellrayError, match=words):
            continue_run(str(run), **settings)
        assert not (place / "data" / "tiny-1").exists()
        assert not (place / "runs" / "tiny-1").exists()

    refused("holds no run", tmp_path)
    refused("events: holds no events; the service stores what is sent to POST /v1/events")
    assert not (tiny / "continuation.json").exists()
    events = send(place, "c0", 2)
    refused("there: holds no events", events=str(tmp_path / "there"))
    with Storage(tiny).lock("train"):
        refused("locked by process")
    summary = (tiny / "summary.json").rename(tmp_path / "summary.json")
    refused("is not finished .round 2 of 2.; go on with the command that began it")
    summary.rename(tiny / "summary.json")
    config = json.loads((tiny / "config.json").read_text())
    longer = config | {"train": config["train"] | {"rounds": 3}}
    (tiny / "config.json").write_text(json.dumps(longer))
    refused("is not finished .round 2 of 3.")
    (tiny / "config.json").write_text(json.dumps(config))
    file = tiny / "events" / "c0.jsonl"
    file.write_bytes(b"{}\n" + file.read_bytes())
    refused("c0.jsonl: is damaged at byte 0")
    file.unlink()
    strange = Event("x", 10**6, events[0].item_id, 1)
    add_events([[("c0", strange)]], {"c0": EventLog(str(file))})
    refused("event 'x' of client c0: user 1000000")


class Killed(BaseException):
    """As if the process were gone."""


STEPS = [
    "fellray.jobs.continuation.extend",
    "fellray.jobs.continuation.open_run",
    "fellray.jobs.continuation.hand_over",
    "fellray.platform.staging.Staging.commit",
    "fellray.jobs.continuation.train",
    "fellray.jobs.train.one_round",
    "fellray.jobs.train.finish",
]


def test_wherever_it_is_killed_the_same_command_ends_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(place, "c0", 6)
    whole = place.parent / "whole"
    shutil.copytree(place, whole)
    config = whole / "runs" / "tiny" / "config.json"
    config.write_text(config.read_text().replace(str(place), str(whole)))
    expected = continue_run(str(whole / "runs" / "tiny"), 2)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    for step in STEPS:
        with monkeypatch.context() as patch:
            patch.setattr(step, die)
            with pytest.raises(Killed):
                continue_run(str(place / "runs" / "tiny"), 2)
    with pytest.raises(FellrayError, match="was begun with --rounds 2"):
        continue_run(str(place / "runs" / "tiny"), 3)
    send(place, "c0", 3, 6)  # too late: the data were extended before
    summary = continue_run(str(place / "runs" / "tiny"))
    for same in ("hashes", "final_hashes", "test", "validation", "best_round"):
        assert summary[same] == expected[same], same
    assert summary["data"]["sha256"] == expected["data"]["sha256"]
    assert read_run(str(place / "runs" / "tiny-1")).journal.rows("metrics")[0]["validation"]


def test_it_begins_with_the_round_that_is_promoted(place: Path) -> None:
    """Here the start: rounds are counted from there."""
    send(place, "c1", 3)
    old = read_run(str(place / "runs" / "tiny"))
    assert old.best_round() > 0
    promote(old.storage, 0, old.rounds.committed)
    continue_run(str(place / "runs" / "tiny"))
    new = read_run(str(place / "runs" / "tiny-1"))
    rows = new.journal.rows("metrics")
    assert [row["round"] for row in rows] == [0, 1]
    learners = Dataset(place / "data" / "tiny-1").clients
    assert Blends(new.storage, learners).trained(0, "client.values") == set()
    assert Blends(new.storage, learners).trained(1, "client.values") == set(learners)


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "method": {"kind": "fedavg"},
            "train": {"moments": "keep", "rounds": 1},
            "server": {"shared_adapter": True},
        },
        {"sampling": {"per_round": 2}, "train": {"rounds": 1}},
    ],
    ids=["what is everyone's", "who never trained"],
)
def test_the_state_is_handed_over_bit_for_bit(
    overrides: dict[str, Any], tiny_config: Callable[..., RunConfig], tiny_data: Path
) -> None:
    config = tiny_config(keep_last=9, **overrides)
    place = finish(config, tiny_data)
    send(place, "c0", 3)
    old = read_run(str(place / "runs" / "tiny"))
    last = config.train.rounds
    promote(old.storage, last, lambda: [last])
    continue_run(str(place / "runs" / "tiny"))
    new = read_run(str(place / "runs" / "tiny-1"))
    names = list(HASHED)
    if config.train.moments == "keep":
        names += [name.replace("values", "moment1") for name in HASHED]
    assert states(new, last, names) == states(old, last, names)
    assert states(new, last + 1, names) != states(old, last, names)
    clients = Dataset(place / "data" / "tiny-1").clients
    for name in names:
        trained = [Blends(run.storage, clients).trained(last, name) for run in (old, new)]
        assert trained[0] == trained[1], name
        at_end = [run.rounds.owners(last, name) for run in (old, new)]
        assert at_end[0] == at_end[1], name
    if config.server.shared_adapter:
        shared = [run.rounds.load_shared(last, "shared.moment1") for run in (old, new)]
        assert shared[0].equal(shared[1])


def test_the_new_run_serves_what_came_before_and_after(place: Path) -> None:
    """What it was trained on is in its data, what came since is read from the first run's folder;
    and an id of either is known."""
    send(place, "c0", 9)
    continue_run(str(place / "runs" / "tiny"))
    late = send(place, "c0", 12, 9)
    user = late[0].user_id
    query = ByUser(client="c0", user_id=user, k=50)
    histories = []
    for name in ("tiny", "tiny-1"):
        whole = open_whole(Args(run=str(place / "runs" / name), round=0))
        own = asyncio.run(whole.read_client("c0"))
        later = asyncio.run(whole.events.later("c0", user))
        found = own.find(user, "now", later)
        assert found is not None
        histories.append(sorted(whole.items.ids[found[0]].tolist()))
        answer = asyncio.run(whole.recommend([query]))[0]
        assert not {item.item_id for item in answer.items} & set(histories[-1])
        again = NewEvent(client="c0", **vars(late[0]))
        assert asyncio.run(whole.events.add([again])) == Receipt(stored=0, known=1)
        whole.close()
    assert histories[0] == histories[1]


def test_an_item_that_came_later_is_trained_on_once_somebody_met_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the one that nobody met stays where it was: the line's service knows both."""
    first = Storage(place / "runs" / "tiny")
    data = Dataset(place / "data" / "prepared")
    encoder = data.manifest["encoder"]["sha256"]
    batch = Batch(np.array([9001, -7]), ["word01", "word02"], [("late",), ()], data.vectors[:2])
    write_batch(first, batch, encoder)
    sent = send(place, "c0", 3)
    user = sent[0].user_id
    log = EventLog(str(place / "runs" / "tiny" / "events" / "c0.jsonl"))
    add_events([[("c0", Event("new", user, -7, 10**9))]], {"c0": log})
    continue_run(str(place / "runs" / "tiny"))
    told = capsys.readouterr().out
    assert "4 new events of 1 clients" in told
    assert "1 of their items came after the training" in told
    new = Dataset(place / "data" / "tiny-1")
    assert new.item_ids.tolist() == [-7, *data.item_ids.tolist()]
    assert new.vectors[0].equal(data.vectors[1])
    assert added(new, "c0") == sorted([*pairs(sent), (user, -7)])
    whole = open_whole(Args(run=str(place / "runs" / "tiny-1"), round="latest"))
    assert [whole.items.index(item) for item in (-7, 9001)] == [0, len(new.item_ids)]
    late = NewEvent(client="c0", event_id="late", user_id=user, item_id=9001, timestamp=1)
    assert asyncio.run(whole.events.add([late])) == Receipt(stored=1, known=0)
    assert asyncio.run(whole.events.later("c0", user)).tolist() == [len(new.item_ids)]
    more = [NewItem(item_id=9002, title="word03"), NewItem(item_id=-7, title="word02")]
    assert whole.catalogue.add(more).result() == 1
    whole.close()
    assert list_batches(first) == ["000001.safetensors", "000002.safetensors"]
    continue_run(str(place / "runs" / "tiny-1"))
    third = Dataset(place / "data" / "tiny-2")
    assert third.item_ids.tolist() == [-7, *data.item_ids.tolist(), 9001]
    assert taken_of(third)["c0"].count == 5
