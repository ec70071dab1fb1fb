"""Features and click sources: what is coded how, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from attribute_clicks import make_config, write_source

from fellray.platform.attribute_model import look_up
from fellray.platform.attributes import Bins
from fellray.platform.clicks import read_clicks, split_clicks
from fellray.platform.errors import FellrayError
from fellray.platform.features import UNSEEN, encode, learn_features, read_feature

TABLE = pa.table(
    {
        "text": ["b", "a", None, "b"],
        "code": pa.array([3.0, 10.0, 3.0, None], pa.float32()),
        "number": [0.0, 19.0, 1e9, 2.0],
    }
)
BINS = {"number": Bins(low=1, high=3, edges=3)}


def test_codes_are_places_among_sorted_values() -> None:
    features = learn_features(TABLE, ["text", "code", "number"], BINS, "t")
    assert [f.values for f in features] == [(None, "a", "b"), (None, "3", "10"), ()]
    assert [f.rows for f in features] == [3, 3, 4]
    # log1p: 0, 3.0, 20.7, 1.1 against the edges 1, 2, 3
    assert encode(features, TABLE, "t").T.tolist() == [[2, 1, 0, 2], [1, 2, 1, 0], [0, 2, 3, 1]]
    assert tuple(read_feature(f.tree()) for f in features) == features


def test_an_unseen_category_reads_the_mean_row() -> None:
    features = learn_features(TABLE, ["text", "code"], {}, "t")
    other = pa.table({"text": ["c", "a"], "code": pa.array([3, 4], pa.int64())})
    codes = encode(features, other, "t")
    assert codes.tolist() == [[UNSEEN, 1], [1, UNSEEN]]
    tables = [torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[0.0], [4.0], [8.0]])]
    assert look_up(tables, torch.from_numpy(codes)).tolist() == [[3.0, 4.0], [2.0, 4.0]]


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(FellrayError, match=r"users\.parquet: has no column 'hair'.*text, code"):
        learn_features(TABLE, ["hair"], {}, "users.parquet")
    features = learn_features(TABLE, ["text"], {}, "t")
    with pytest.raises(FellrayError, match=r"new\.parquet: has no column 'text'"):
        encode(features, TABLE.drop_columns("text"), "new.parquet")
    with pytest.raises(FellrayError, match=r"column 'text' is string, but attributes\.bins cuts"):
        encode(learn_features(TABLE, ["text"], {"text": BINS["number"]}, "t"), TABLE, "t")


def test_the_newest_fifths_are_held_out() -> None:
    ends = np.array([4, 14, 26])
    found = split_clicks(ends, 0.2, 0.2)
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert found[4:14].tolist() == [0] * 6 + [1, 1, 2, 2]
    assert np.bincount(found[14:]).tolist() == [8, 2, 2]


def test_open_users_are_a_share_of_those_named_and_of_the_others(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    rule = {"attribute": "age", "values": ["18-30"], "inside": 1.0, "outside": 0.0}
    config = make_config(source, tmp_path, attributes={"open": rule})
    assert config.attributes is not None
    clicks = read_clicks(config.attributes, config.data)
    ages = clicks.user_features[0].values
    assert clicks.open_U.tolist() == [ages[c] == "18-30" for c in clicks.users_UF[:, 0]]
    assert clicks.users_of_samples().max() == len(clicks.open_U) - 1
    rows = pq.read_table(source / "interactions.parquet").sort_by("timestamp")
    mine = rows.filter(pa.compute.equal(rows["user_id"], 107))
    assert clicks.user_id_U[7] == 107
    assert (
        clicks.item_N[clicks.ends_U[6] : clicks.ends_U[7]].tolist() == mine["item_id"].to_pylist()
    )


def change(file: str, work: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(work(pq.read_table(folder / file)), folder / file)


def relabel(table: pa.Table) -> pa.Table:
    return table.set_column(3, "label", pa.array([2] * len(table), pa.int8()))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change("interactions.parquet", lambda t: t.drop_columns("label")), "no column 'label'"),
        (change("interactions.parquet", relabel), "'label' must be 0 or 1.*holds 2"),
        (
            change("users.parquet", lambda t: t.slice(1)),
            "user_id 100 has no row in .*users.parquet",
        ),
        (change("items.parquet", lambda t: pa.concat_tables([t, t])), "item_id 0 occurs more than"),
        (lambda folder: (folder / "items.parquet").unlink(), "items.parquet: cannot be read"),
    ],
)
def test_a_source_that_cannot_be_read(
    spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    config = make_config(write_source(tmp_path / "source"), tmp_path)
    assert config.attributes is not None
    spoil(tmp_path / "source")
    with pytest.raises(FellrayError, match=words):
        read_clicks(config.attributes, config.data)


def test_open_users_that_cannot_be(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    for rule, words in (
        ({"attribute": "age", "values": ["99"]}, r"values names '99', but no user has it as age"),
        ({"inside": 1.0, "outside": 1.0}, r"leaves 60 open users and 0 clients of 60"),
    ):
        config = make_config(source, tmp_path, attributes={"open": rule})
        assert config.attributes is not None
        with pytest.raises(FellrayError, match=words):
            read_clicks(config.attributes, config.data)
