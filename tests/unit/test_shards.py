"""The prepared folder: written whole, the same bytes each time, checked when read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fellray.platform import shard_writing
from fellray.platform.data_config import DataConfig
from fellray.platform.errors import FellrayError
from fellray.platform.interactions import Interactions
from fellray.platform.shard import Shard
from fellray.platform.shard_writing import write_shards
from fellray.platform.shards import Dataset

# user: items (splits): 7: 30 10 20 10 (0 0 1 2), 8: 20 10 30 (0 0 0), 9: 10 20 (0 0), 4: 20 (2)
USER = np.array([4, 7, 7, 7, 7, 8, 8, 8, 9, 9])
ITEM = np.array([20, 30, 10, 20, 10, 20, 10, 30, 10, 20])
SPLIT = np.array([2, 0, 0, 1, 2, 0, 0, 0, 0, 0], np.uint8)
CLIENTS = {"c1": np.array([8]), "c0": np.array([7, 9])}
VECTORS = np.eye(3, 5, dtype=np.float32)


def rows() -> Interactions:
    return Interactions(
        user_id=USER,
        item_id=ITEM,
        timestamp=np.arange(10) + 100,
        seq=np.array([0, 0, 1, 2, 3, 0, 1, 2, 0, 1], np.int32),
        rating=None,
        items=pa.table(
            {"item_id": [10, 20, 30], "title": ["Heat", "Up", "Heat"], "categories": ["", "A", ""]}
        ),
        timestamp_kind="unix_seconds",
    )


def write(path: Path, clients: dict[str, np.ndarray] = CLIENTS) -> dict[str, Any]:
    config = DataConfig(path=path)
    return write_shards(config, rows(), SPLIT, clients, "tiny", "ab" * 32, VECTORS)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.rglob("*"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.is_file()}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    manifest = write(tmp_path / "data")
    got = Dataset(tmp_path / "data")
    assert got.manifest == manifest
    assert got.clients == ("c0", "c1")
    assert got.item_ids.tolist() == [10, 20, 30]
    assert got.titles == ["Heat", "Up", "Heat"]
    assert got.categories == ["", "A", ""]
    assert got.popularity.tolist() == [3, 2, 2]
    assert torch.equal(got.vectors, torch.from_numpy(VECTORS))
    shard = got.shard("c0")
    assert shard.users.tolist() == [7, 9]
    assert shard.offsets.tolist() == [0, 4, 6]
    assert shard.items.tolist() == [2, 0, 1, 0, 0, 1]
    assert shard.splits.tolist() == [0, 0, 1, 2, 0, 0]
    assert [a.dtype for a in (shard.users, shard.offsets, shard.items, shard.splits)] == [
        np.int64,
        np.int64,
        np.int32,
        np.uint8,
    ]


def test_manifest_counts_and_drops_users_without_a_client(tmp_path: Path) -> None:
    manifest = write(tmp_path / "data")
    assert manifest["counts"] == {
        "users": 3,
        "items": 3,
        "interactions": 9,
        "train": 7,
        "valid": 1,
        "test": 1,
        "dropped": 1,
    }
    entry = manifest["clients"]["c0"]
    assert (entry["users"], entry["train"], entry["valid"], entry["test"]) == (2, 4, 1, 1)
    assert manifest["encoder"] == {"name": "tiny", "sha256": "ab" * 32}
    assert manifest["vectors"]["dim"] == 5
    assert "path" not in manifest["data"]


def described() -> Interactions:
    """`rows` from a source with text ids and attributes that left something out."""
    attributes = pa.table({"user_id": [4, 8, 9], "gender": ["F", "M", None], "age": [1, 2, 3]})
    items = rows().items.append_column("source_id", pa.array(["x", "y", "z"]))
    return replace(rows(), items=items, users=attributes, left_out={"interactions": 5})


def write_described(path: Path) -> dict[str, Any]:
    config = DataConfig(path=path)
    return write_shards(config, described(), SPLIT, CLIENTS, "tiny", "ab" * 32, VECTORS)


def test_users_text_ids_and_what_was_left_out_are_kept(tmp_path: Path) -> None:
    manifest = write_described(tmp_path / "data")
    assert manifest["left_out"] == {"interactions": 5}
    assert (manifest["users"]["file"], manifest["users"]["count"]) == ("users.parquet", 3)
    got = Dataset(tmp_path / "data")
    assert got.source_ids == ["x", "y", "z"]
    assert got.users is not None
    assert got.users.to_pydict() == {  # 4 is in no client, of 7 nothing is known
        "user_id": [7, 8, 9],
        "gender": [None, "M", None],
        "age": [None, 2, 3],
    }
    damaged = tmp_path / "data" / "users.parquet"
    damaged.write_bytes(b"\xff" + damaged.read_bytes()[1:])
    with pytest.raises(FellrayError, match=r"users\.parquet: is missing, or its bytes"):
        Dataset(tmp_path / "data").users  # noqa: B018


def test_a_source_without_them_has_none(tmp_path: Path) -> None:
    manifest = write(tmp_path / "data")
    assert not {"users", "left_out"} & manifest.keys()
    assert "users" not in manifest["data"]
    got = Dataset(tmp_path / "data")
    assert (got.users, got.source_ids) == (None, None)


def test_same_input_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b" / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b" / "c")
    assert Dataset(tmp_path / "a").sha256 == Dataset(tmp_path / "b" / "c").sha256
    assert sorted(contents(tmp_path / "a")) == [
        "clients/c0.parquet",
        "clients/c1.parquet",
        "items.parquet",
        "manifest.json",
        "vectors.safetensors",
    ]


def test_a_prepared_folder_is_replaced_whole_and_kept_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    write(path, {"c0": np.array([7, 8, 9])})
    before = contents(path)
    monkeypatch.setattr(shard_writing.safetensors.numpy, "save", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(path)
    assert contents(path) == before
    monkeypatch.undo()
    write(path)
    assert Dataset(path).clients == ("c0", "c1")
    assert [f.name for f in tmp_path.iterdir()] == ["data"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(FellrayError, match="is no prepared folder, so it is left alone"):
        write(tmp_path / "data")
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"
    with pytest.raises(FellrayError, match="is no prepared folder, so it is left alone"):
        write(tmp_path / "data" / "thesis.txt")
    with pytest.raises(FellrayError, match="cannot be written"):
        write(tmp_path / "data" / "thesis.txt" / "below")


def test_a_client_with_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FellrayError, match=r"client c1 \(1 of 2 clients\): no user has 2 training"):
        write(tmp_path / "data", {"c0": np.array([7, 8, 9]), "c1": np.array([4])})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "file", ["items.parquet", "clients/c0.parquet", "vectors.safetensors", "manifest.json"]
)
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_damage_is_found_when_the_file_is_read(tmp_path: Path, file: str, how: str) -> None:
    write(tmp_path / "data")
    damaged = tmp_path / "data" / file
    raw = damaged.read_bytes()
    if how == "gone":
        damaged.unlink()
    elif how == "cut":
        damaged.write_bytes(raw[: len(raw) // 2])
    else:
        damaged.write_bytes(b"\xff" + raw[1:])
    with pytest.raises(FellrayError, match="fellray prepare") as caught:
        read_all(tmp_path / "data")
    assert damaged.name in str(caught.value)


def read_all(path: Path) -> None:
    dataset = Dataset(path)
    assert dataset.vectors.shape == (3, 5)
    dataset.shard("c0")


def test_missing_folder_other_version_and_unknown_client_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FellrayError, match="run `fellray prepare`"):
        Dataset(tmp_path / "none")
    write(tmp_path / "data")
    with pytest.raises(FellrayError, match=r"no client 'c2'; it has 2 clients, the nearest.*'c"):
        Dataset(tmp_path / "data").shard("c2")
    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(FellrayError, match="is version 9"):
        Dataset(tmp_path / "data")


SHARD = Shard(
    client="c0",
    users=np.array([3, 5, 6, 9]),
    offsets=np.array([0, 5, 7, 8, 10]),
    items=np.array([1, 2, 1, 3, 2, 4, 4, 0, 6, 7], np.int32),
    splits=np.array([0, 0, 0, 1, 2, 0, 0, 2, 0, 2], np.uint8),
)


def test_counts_targets_and_histories() -> None:
    assert SHARD.counts(8).tolist() == [0, 2, 1, 0, 2, 0, 1, 0]
    assert SHARD.counts(8).dtype == np.int64
    assert SHARD.train_targets().tolist() == [1, 2, 6]
    assert SHARD.history(2, 8).tolist() == [1, 2]
    assert SHARD.history(4, 3).tolist() == [2, 1, 3]
    assert SHARD.history(5, 3).tolist() == []
    assert SHARD.history(6, 1).tolist() == [4]
    assert SHARD.history(6, 1).dtype == np.int32


def test_held_out_leaves_out_the_strangers_and_unmasks_repeats() -> None:
    valid, test = SHARD.held_out(1), SHARD.held_out(2)
    assert valid.users.tolist() == [3]
    assert [a.tolist() for a in valid.histories] == [[1, 2, 1]]
    assert [a.tolist() for a in valid.truth] == [[3]]
    assert test.users.tolist() == [3, 9]  # 6 has no history
    assert [a.tolist() for a in test.histories] == [[1, 2, 1, 3], [6]]
    assert [a.tolist() for a in test.truth] == [[2], [7]]
    assert [a.tolist() for a in test.seen] == [[1, 1, 3], [6]]  # 2 comes again: not masked
    assert {a.dtype for a in (*test.histories, *test.truth, *test.seen)} == {np.dtype(np.int32)}


def test_nothing_held_out_gives_empty_lists() -> None:
    only_training = Shard(
        client="c0",
        users=np.array([3]),
        offsets=np.array([0, 2]),
        items=np.array([1, 2], np.int32),
        splits=np.zeros(2, np.uint8),
    )
    held = only_training.held_out(1)
    assert (len(held.users), held.histories, held.seen, held.truth) == (0, [], [], [])


@given(
    histories=st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=8),
        min_size=1,
        max_size=6,
    ),
    split=st.sampled_from([1, 2]),
)
def test_held_out_agrees_with_the_definition(
    histories: list[list[tuple[int, int]]], split: Any
) -> None:
    sorted_by_split = [sorted(h, key=lambda pair: pair[0]) for h in histories]
    flat = [pair for h in sorted_by_split for pair in h]
    shard = Shard(
        client="c",
        users=np.arange(len(histories)),
        offsets=np.cumsum([0, *map(len, histories)]),
        items=np.array([i for _, i in flat], np.int32),
        splits=np.array([s for s, _ in flat], np.uint8),
    )
    expected = []
    for user, h in enumerate(sorted_by_split):
        before, truth = [i for s, i in h if s < split], [i for s, i in h if s == split]
        if before and truth:
            expected.append((user, before, [i for i in before if i not in truth], truth))
    held = shard.held_out(split)
    columns = (held.users, held.histories, held.seen, held.truth)
    got = [
        (int(u), h.tolist(), s.tolist(), t.tolist()) for u, h, s, t in zip(*columns, strict=True)
    ]
    assert got == expected
