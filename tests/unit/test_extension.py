"""Prepared data with events: trained on and counted, while what is held out stays what it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_reader import TOKENS, config, read
from test_shards import contents, write, write_described

from fellray.platform.additions import Batch
from fellray.platform.data_config import DataConfig
from fellray.platform.errors import FellrayError
from fellray.platform.events import Event
from fellray.platform.extension import Added, extend, taken_of
from fellray.platform.intake import Taken
from fellray.platform.reader import Reader
from fellray.platform.shard import LATER, Shard
from fellray.platform.shards import Dataset

TAKEN = Taken(100, 3, "ab" * 32)
EVENTS = [Event("a", 7, 20, 900), Event("b", 9, 30, 500), Event("c", 7, 30, 800)]


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    write(tmp_path / "data")
    return Dataset(tmp_path / "data")


def extended(data: Dataset, path: Path, *events: Event, taken: Taken = TAKEN) -> Dataset:
    extend(data, DataConfig(path=path), {"c0": Added(taken, events)}, path)
    return Dataset(path)


def test_events_follow_their_users_by_time(data: Dataset, tmp_path: Path) -> None:
    """User 7: 30 10 20 10 (0 0 1 2), then 30 and 20; user 9: 10 20 (0 0), then 30."""
    config = DataConfig(path=data._path)
    counts = extend(data, config, {"c0": Added(TAKEN, EVENTS)}, tmp_path / "new")
    assert counts == {"events": 3, "clients": 1, "repeats": 1}
    new = Dataset(tmp_path / "new")
    shard = new.shard("c0")
    assert shard.users.tolist() == [7, 9]
    assert shard.offsets.tolist() == [0, 6, 9]
    assert data.item_ids[shard.items].tolist() == [30, 10, 20, 10, 30, 20, 10, 20, 30]
    assert shard.splits.tolist() == [0, 0, 1, 2, LATER, LATER, 0, 0, LATER]
    assert new.rows("c0")["timestamp"].to_pylist()[4:6] == [800, 900]
    assert new.popularity.tolist() == (data.popularity + np.array([0, 1, 2])).tolist()
    assert new.manifest["counts"]["train"] == data.manifest["counts"]["train"] + 3
    assert taken_of(new) == {"c0": TAKEN}
    assert taken_of(data) == {}
    before, after = contents(tmp_path / "data"), contents(tmp_path / "new")
    for same in ("clients/c1.parquet", "vectors.safetensors"):
        assert before[same] == after[same]
    same_again = extended(data, tmp_path / "again", *EVENTS)
    assert contents(tmp_path / "again") == after
    assert same_again.sha256 == new.sha256 != data.sha256


def test_what_is_held_out_is_held_out_as_before(data: Dataset, tmp_path: Path) -> None:
    new = extended(data, tmp_path / "new", *EVENTS)
    for split in (1, 2):
        old, now = data.shard("c0").held_out(split), new.shard("c0").held_out(split)
        assert old.users.tolist() == now.users.tolist()
        for name in ("histories", "seen", "truth"):
            theirs = zip(getattr(old, name), getattr(now, name), strict=True)
            assert all(np.array_equal(a, b) for a, b in theirs), name


def test_attributes_text_ids_and_counts_go_along(tmp_path: Path) -> None:
    write_described(tmp_path / "data")
    new = extended(Dataset(tmp_path / "data"), tmp_path / "new", *EVENTS)
    assert new.source_ids == ["x", "y", "z"]
    assert new.manifest["left_out"] == {"interactions": 5}
    before, after = contents(tmp_path / "data"), contents(tmp_path / "new")
    assert before["users.parquet"] == after["users.parquet"]


def test_again_and_again(data: Dataset, tmp_path: Path) -> None:
    first = extended(data, tmp_path / "first", *EVENTS[:1])
    more = Taken(200, 4, "cd" * 32)
    second = extended(first, tmp_path / "second", Event("d", 7, 10, 5), taken=more)
    shard = second.shard("c0")
    assert data.item_ids[shard.items[:6]].tolist() == [30, 10, 20, 10, 20, 10]
    assert taken_of(second) == {"c0": more}


def test_an_item_that_came_later_stands_among_the_others(tmp_path: Path) -> None:
    """Ids 15 and -4 between 10 20 30: every index moves, and no history."""
    write_described(tmp_path / "data")
    data = Dataset(tmp_path / "data")
    vectors = torch.arange(10.0).reshape(2, 5)
    later = Batch(np.array([15, -4]), ["Nine", "Ten"], [("B", "C"), ()], vectors)
    added = {"c0": Added(TAKEN, [*EVENTS, Event("d", 9, 15, 600)])}
    counts = extend(data, DataConfig(path=data._path), added, tmp_path / "new", later)
    assert counts == {"events": 4, "clients": 1, "repeats": 1}
    new = Dataset(tmp_path / "new")
    assert new.item_ids.tolist() == [-4, 10, 15, 20, 30]
    assert new.titles == ["Ten", data.titles[0], "Nine", *data.titles[1:]]
    assert new.categories == ["", data.categories[0], "B|C", *data.categories[1:]]
    assert new.source_ids == [None, "x", None, "y", "z"]
    assert new.vectors[[2, 0]].equal(vectors)
    assert new.vectors[[1, 3, 4]].equal(data.vectors)
    shard = new.shard("c0")
    assert new.item_ids[shard.items].tolist() == [30, 10, 20, 10, 30, 20, 10, 20, 30, 15]
    theirs = data.shard("c1")
    assert new.item_ids[new.shard("c1").items].tolist() == data.item_ids[theirs.items].tolist()
    assert new.popularity[[0, 2]].tolist() == [0, 1]
    for split in (1, 2):
        old, now = data.shard("c0").held_out(split), shard.held_out(split)
        for a, b in zip(old.truth, now.truth, strict=True):
            assert data.item_ids[a].tolist() == new.item_ids[b].tolist()


def test_an_event_of_other_data_is_named(data: Dataset, tmp_path: Path) -> None:
    for strange in (Event("x", 8, 10, 1), Event("x", 7, 11, 1), Event("x", 7, 99, 1)):
        with pytest.raises(FellrayError, match=r"event 'x' of client c0: user . or item .. is not"):
            extended(data, tmp_path / "new", EVENTS[0], strange)
        assert not (tmp_path / "new").exists()


def test_training_reads_nothing_that_is_held_out() -> None:
    """Of user 0 of client a: what follows the held-out items is read after what precedes them."""
    items = np.array([1, 2, 3, 4, 5, 6], np.int32)
    splits = np.array([0, 0, 1, 2, LATER, LATER], np.uint8)
    shard = Shard("a", np.array([0]), np.array([0, 6]), items, splits)
    read = shard.readable()
    assert read.items.tolist() == [1, 2, 5, 6]
    assert read.offsets.tolist() == [0, 4]
    assert read.train_targets().tolist() == [1, 2, 3]
    assert read.history(3, 8).tolist() == [1, 2, 5]
    assert shard.counts(8).tolist() == [0, 1, 1, 0, 0, 1, 1, 0]
    before = replace(shard, splits=np.array([0, 0, 1, 2, 2, 2], np.uint8))
    assert before.readable() is before


def test_a_pass_trains_on_each_event_once() -> None:
    """Item i's tokens are 1000 i + 1, 2, ...: so a row says which items it was made of."""
    items = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], np.int32)
    splits = np.array([0, 0, 1, 2, LATER, LATER, 0, 0, LATER], np.uint8)
    shard = Shard("a", np.array([0, 5]), np.array([0, 6, 9]), items, splits)
    reader = Reader(config(local_samples=5), TOKENS, {"a": [shard]})
    rows = [
        (target, sorted({token // 1000 for token in ids if token > 1000}))
        for ids, target in read(reader, 0, round=1)
    ]
    assert sorted(rows) == [(2, [1]), (5, [1, 2]), (6, [1, 2, 5]), (8, [7]), (9, [7, 8])]
    held = [
        (int(truth[0][0]), rows)
        for split in (1, 2)
        for batch, _, truth in reader.held_out(split, None)
        for rows in [{int(token) // 1000 for token in batch.ids_L if token > 1000}]
    ]
    assert held == [(3, {1, 2}), (4, {1, 2, 3})]
