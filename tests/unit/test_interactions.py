"""Reading, checking, filtering and splitting interactions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fellray.platform import interactions as data
from fellray.platform.data_config import DataConfig, LeaveOneOut, Temporal
from fellray.platform.errors import FellrayError

REAL = Path(__file__).parents[2] / "../shared/data"
ROWS = {
    "user_id": [2, 1, 1, 2, 1],
    "item_id": [10, 10, 20, 30, 30],
    "timestamp": [5, 9, 3, 4, 9],
    "title": ["Heat", "Heat", "Up", "Heat", "Heat"],
}


def read(source: Path, **options: Any) -> data.Interactions:
    return data.read(DataConfig(source=str(source), k_core=1).model_copy(update=options))


def parquet(folder: Path, **columns: Any) -> Path:
    """A Parquet file of ROWS, changed by `columns`; None takes a column away."""
    table = {k: v for k, v in {**ROWS, **columns}.items() if v is not None}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return folder / "rows.parquet"


def made(users: list[int], times: list[int], kind: Any = "unix_seconds") -> data.Interactions:
    n = len(users)
    return data.Interactions(
        user_id=np.array(users, np.int64),
        item_id=np.arange(n),
        timestamp=np.array(times, np.int64),
        seq=np.zeros(n, np.int32),
        rating=None,
        items=pa.table({"item_id": np.arange(n)}),
        timestamp_kind=kind,
    )


def test_rows_are_sorted_by_user_then_time_and_ties_keep_the_files_order(tmp_path: Path) -> None:
    got = read(parquet(tmp_path))
    assert got.user_id.tolist() == [1, 1, 1, 2, 2]
    assert got.item_id.tolist() == [20, 10, 30, 30, 10]
    assert got.seq.tolist() == [0, 1, 2, 0, 1]
    assert (got.user_id.dtype, got.timestamp.dtype, got.seq.dtype) == (np.int64, np.int64, np.int32)
    assert got.items.to_pydict() == {  # a title twice is legal
        "item_id": [10, 20, 30],
        "title": ["Heat", "Up", "Heat"],
        "categories": ["", "", ""],
    }
    assert got.rating is None
    assert got.timestamp_kind == "unix_seconds"


def test_without_timestamps_the_order_of_the_file_counts(tmp_path: Path) -> None:
    got = read(parquet(tmp_path, timestamp=None))
    assert got.timestamp_kind == "order_only"
    assert got.item_id.tolist() == [10, 20, 30, 10, 30]


def test_csv_with_a_column_map_text_ids_and_a_file_of_items(tmp_path: Path) -> None:
    rows, items = tmp_path / "log.csv", tmp_path / "films.csv"
    rows.write_text(
        "who,what,when,stars\nzoe,b,2020-01-02,5\nann,b,2020-01-01,1\nzoe,a,2020-01-01,2\n"
    )
    items.write_text("item_id,name,categories\na,1984,War|Drama\nb,2046,\n")
    columns = {
        "user_id": "who",
        "item_id": "what",
        "timestamp": "when",
        "rating": "stars",
        "title": "name",
    }
    got = read(rows, items=items, columns=columns)
    assert got.user_id.tolist() == [0, 1, 1]  # ann, zoe, zoe
    assert got.item_id.tolist() == [1, 0, 1]
    assert got.timestamp.tolist() == [1577836800, 1577836800, 1577836800 + 86400]
    assert got.rating is not None
    assert got.rating.tolist() == [1, 2, 5]
    assert got.items["title"].to_pylist() == ["1984", "2046"]
    assert got.items["source_id"].to_pylist() == ["a", "b"]
    assert got.items["categories"].to_pylist() == ["War|Drama", ""]
    assert read(rows, items=items, columns=columns, min_rating=2.0).user_id.tolist() == [1, 1]


def test_movielens_folder(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("7\t2\t5\t100\n7\t1\t3\t90\n")
    flags = ["0|1" + "|0" * 17, "1" + "|0" * 17 + "|1"]
    lines = [f'1|L\'été "x" (1995)|01-Jan-1995||url|{flags[0]}', f"2|unknown||||{flags[1]}"]
    (tmp_path / "u.item").write_bytes("\n".join(lines).encode("latin-1"))
    got = read(tmp_path)
    assert got.item_id.tolist() == [1, 2]
    assert got.items["title"].to_pylist() == ['L\'été "x" (1995)', "unknown"]
    assert got.items["categories"].to_pylist() == ["Action", "unknown|Western"]


@pytest.mark.parametrize("kind", ["order_only", "unix_seconds"])
def test_schema_folder_takes_the_kind_of_time_from_metadata_or_meta_json(
    tmp_path: Path, kind: str
) -> None:
    rows = pa.table({"user_id": [1, 1], "item_id": [5, 4], "timestamp": [0, 1], "seq": [0, 1]})
    items = pa.table({"item_id": [5, 4], "title": ["A", "B"]})
    pq.write_table(items, tmp_path / "items.parquet")
    pq.write_table(rows, tmp_path / "interactions.parquet")
    with pytest.raises(FellrayError, match="timestamp_kind"):
        read(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"timestamp_kind": kind}))
    assert read(tmp_path).timestamp_kind == kind
    pq.write_table(
        rows.replace_schema_metadata({"timestamp_kind": "order_only"}),
        tmp_path / "interactions.parquet",
    )
    assert read(tmp_path).timestamp_kind == "order_only"


def test_schema_folder_whose_seq_goes_back_in_time_is_refused(tmp_path: Path) -> None:
    rows = pa.table({"user_id": [3, 3], "item_id": [5, 5], "timestamp": [9, 1], "seq": [0, 1]})
    pq.write_table(
        rows.replace_schema_metadata({"timestamp_kind": "unix_seconds"}),
        tmp_path / "interactions.parquet",
    )
    pq.write_table(pa.table({"item_id": [5], "title": ["A"]}), tmp_path / "items.parquet")
    with pytest.raises(FellrayError, match=r"seq and timestamp disagree.*user_id 3"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"user_id": None},
            r"'user_id'.*it has item_id, timestamp, title.*data\.columns\.user_id=",
        ),
        ({"title": None}, r"'title'.*data\.columns\.title=.*data\.items="),
        ({"timestamp": ["a"] * 5}, "timestamp is of type string.*unix seconds"),
        ({"timestamp": [1, 2, 3, None, 5]}, "timestamp is null or empty in 1 of 5"),
        ({"user_id": [1, None, 2, 2, 2]}, "user_id is null or empty in 1 of 5"),
        ({"item_id": [1.5] * 5}, "item_id is of type double"),
        ({"rating": ["good"] * 5}, "rating is of type string"),
        ({"title": ["A", "A", " ", "A", "A"]}, r"no title for item_id 20 \(1 in all\)"),
        ({"title": [1, 2, 3, 4, 5]}, "title is of type int64"),
    ],
)
def test_bad_columns_name_the_file_the_column_and_the_way_out(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(FellrayError, match=message) as caught:
        read(parquet(tmp_path, **columns))
    assert "rows.parquet" in str(caught.value)


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FellrayError, match="does not exist"):
        read(tmp_path / "none.parquet")
    with pytest.raises(FellrayError, match=r"ending in .*\.csv.*does not exist"):
        read(tmp_path / "none")
    with pytest.raises(FellrayError, match="neither is there"):
        read(tmp_path)
    (tmp_path / "cut.parquet").write_bytes(parquet(tmp_path).read_bytes()[:100])
    with pytest.raises(FellrayError, match=r"cut\.parquet: cannot be read"):
        read(tmp_path / "cut.parquet")
    with pytest.raises(FellrayError, match=r"data\.columns\.user: fellray knows no such"):
        read(parquet(tmp_path), columns={"user": "who"})
    with pytest.raises(FellrayError, match=r"no column is called 'when' \(timestamp\)"):
        read(parquet(tmp_path), columns={"timestamp": "when"})
    with pytest.raises(FellrayError, match=r"data\.columns and data\.items belong to"):
        read(tmp_path, columns={"user_id": "who"})
    with pytest.raises(FellrayError, match="has no ratings"):
        read(parquet(tmp_path), min_rating=3.0)
    with pytest.raises(FellrayError, match=r"no interaction is left.*k_core=9"):
        read(parquet(tmp_path), k_core=9)


def test_items_file_must_hold_every_item_once_under_the_same_type(tmp_path: Path) -> None:
    rows, items = parquet(tmp_path, title=None), tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": [10], "title": ["A"]}), items)
    with pytest.raises(FellrayError, match=r"item_id 20, 30 \(2 in all\) not in .*items\.parquet"):
        read(rows, items=items)
    pq.write_table(pa.table({"item_id": [30, 20, 10, 20], "title": list("ABCD")}), items)
    with pytest.raises(FellrayError, match="item_id 20 occurs more than once"):
        read(rows, items=items)
    pq.write_table(pa.table({"item_id": ["10"], "title": ["A"]}), items)
    with pytest.raises(FellrayError, match=r"int64 in .*rows.*string in .*items"):
        read(rows, items=items)


def test_k_core_one_keeps_unmet_items_and_a_higher_one_drops_them(tmp_path: Path) -> None:
    rows, items = parquet(tmp_path, title=None), tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": [10, 20, 30, 40], "title": list("ABCD")}), items)
    assert read(rows, items=items).items["item_id"].to_pylist() == [10, 20, 30, 40]
    got = read(rows, items=items, k_core=2)
    assert got.items["item_id"].to_pylist() == [10, 30]
    assert got.item_id.tolist() == [10, 30, 30, 10]
    assert got.seq.tolist() == [0, 1, 0, 1]


@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60),
    k=st.integers(2, 4),
)
def test_k_core_is_the_largest_subset_with_k_each(pairs: list[tuple[int, int]], k: int) -> None:
    user, item = np.array(pairs).T
    kept = data._core(user, item, k).tolist()
    left = list(range(len(pairs)))
    while True:  # one bad row at a time: the k-core does not depend on the order
        bad = [
            n
            for n in left
            if sum(user[m] == user[n] for m in left) < k
            or sum(item[m] == item[n] for m in left) < k
        ]
        if not bad:
            break
        left.remove(bad[0])
    assert kept == left


def test_max_users_keeps_a_seeded_sample() -> None:
    users = [
        np.unique(data.read(DataConfig(max_users=50, k_core=1, seed=seed)).user_id).tolist()
        for seed in (0, 0, 1)
    ]
    assert len(users[0]) == 50
    assert users[0] == users[1] != users[2]


def test_leave_one_out_holds_the_last_two_and_spares_short_histories() -> None:
    got = data.split(made([1, 1, 1, 2, 2, 3, 3, 3, 3], [0] * 9), LeaveOneOut())
    assert got.tolist() == [0, 1, 2, 0, 0, 0, 0, 1, 2]
    assert got.dtype == np.uint8
    with pytest.raises(
        FellrayError, match=r"at least 3 interactions.*longest of 2 histories has 2"
    ):
        data.split(made([1, 1, 2], [0] * 3), LeaveOneOut())


def test_temporal_split_cuts_everybody_at_the_same_two_moments() -> None:
    rows = made([1] * 5 + [2] * 5, [0, 1, 2, 8, 9, 3, 4, 5, 6, 7])
    got = data.split(rows, Temporal(valid=0.2, test=0.2))
    assert got.tolist() == [0, 0, 0, 2, 2, 0, 0, 0, 1, 1]
    tied = data.split(made([1] * 6, [0, 0, 0, 5, 5, 9]), Temporal(valid=0.33, test=0.16))
    assert tied.tolist() == [0, 0, 0, 1, 1, 2]
    with pytest.raises(FellrayError, match=r"use data\.split\.kind=leave_one_out"):
        data.split(made([1] * 3, [0, 1, 2], "order_only"), Temporal())
    with pytest.raises(FellrayError, match="leaves 0 training"):
        data.split(made([1] * 3, [4, 4, 4]), Temporal())


@pytest.mark.parametrize(
    ("name", "counts", "kind"),
    [
        ("ml-100k", [98_114, 943, 943], "unix_seconds"),
        ("amazon-games-2018", [351_897, 50_546, 50_546], "order_only"),
        ("movietweetings-100k", [86_462, 6_769, 6_769], "unix_seconds"),
    ],
)
def test_real_sets_have_their_published_leave_one_out_counts(
    name: str, counts: list[int], kind: str
) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real data set {name} is not beside this checkout")
    got = read(REAL / name)
    assert np.bincount(data.split(got, LeaveOneOut())).tolist() == counts
    assert got.timestamp_kind == kind


def test_a_real_set_without_titles_says_so() -> None:
    folder = REAL / "kuaisar-r-sample"
    if not folder.is_dir():
        pytest.skip(f"the real data set {folder.name} is not beside this checkout")
    with pytest.raises(FellrayError, match=r"items\.parquet: no column is called 'title'"):
        read(folder)


def test_users_of_a_schema_folder_and_of_a_table(tmp_path: Path) -> None:
    users = pa.table({"user_id": [3, 1, 2], "age": [30, None, 20], "tags": [["a", "b"], [], None]})
    expected = {"user_id": [1, 2, 3], "age": [None, 20, 30], "tags": ["", None, "a|b"]}
    pq.write_table(users, tmp_path / "users.parquet")
    got = read(parquet(tmp_path), users=tmp_path / "users.parquet").users
    assert got is not None
    assert got.to_pydict() == expected
    rows = pa.table({"user_id": [1, 1], "item_id": [5, 4], "timestamp": [0, 1], "seq": [0, 1]})
    kind = {"timestamp_kind": "order_only"}
    pq.write_table(rows.replace_schema_metadata(kind), tmp_path / "interactions.parquet")
    items = pa.table({"item_id": [5, 4], "title": ["A", "B"]})
    pq.write_table(items, tmp_path / "items.parquet")
    got = read(tmp_path).users
    assert got is not None
    assert got.to_pydict() == expected
    (tmp_path / "users.parquet").unlink()
    (tmp_path / "users.csv").write_text("user_id,team\n1,red\n")
    got = read(tmp_path).users
    assert got is not None
    assert got.to_pydict() == {"user_id": [1], "team": ["red"]}


def test_text_ids_of_users_and_their_own_name_for_it(tmp_path: Path) -> None:
    rows, users = tmp_path / "log.csv", tmp_path / "people.csv"
    rows.write_text("who,item_id,title\nzoe,7,Up\nbob,7,Up\n")
    users.write_text("who,team\nzoe,red\nann,blue\n")
    got = read(rows, users=users, columns={"user_id": "who"})
    assert got.user_id.tolist() == [1, 2]  # ann is 0, by both files
    assert got.users is not None
    assert got.users.to_pydict() == {"user_id": [0, 2], "team": ["blue", "red"]}
    users.write_text("user_id,team\nzoe,red\n")
    got = read(rows, users=users, columns={"user_id": "who"})
    assert got.users is not None
    assert got.users.to_pydict() == {"user_id": [1], "team": ["red"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,team\n1,red\n", r"people\.csv: no column is called 'user_id'.*it has id, team"),
        ("user_id,team\n1,red\n1,blue\n", "user_id 1 occurs more than once"),
        ("user_id,team\nann,red\n", r"int64 in .*rows\.parquet, string in .*people\.csv"),
        ("user_id,team\n,red\n7,\n", "user_id is null or empty in 1 of 2 rows, in row 1"),
        ("user_id\n1\n", "has no column besides user_id"),
        ("user_id,born\n1,2001-01-01\n", r"people\.csv: born is of type date32.*must be text"),
        ("user_id,team\n", r"people\.csv: has no rows"),
    ],
)
def test_bad_users(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text(text)
    with pytest.raises(FellrayError, match=message):
        read(parquet(tmp_path), users=tmp_path / "people.csv")
    with pytest.raises(FellrayError, match=r"none\.csv: does not exist.*data\.users"):
        read(parquet(tmp_path), users=tmp_path / "none.csv")


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("user_id,item_id,title,title\n1,1,Up,Down\n")
    with pytest.raises(FellrayError, match="2 columns are called 'title'"):
        read(tmp_path / "rows.csv")


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_file_with_another_separator(mark: str, tmp_path: Path) -> None:
    rows = [["user_id", "item_id", '"title, or name"'], ["1", "7", '"Moby-Dick; or, The Whale"']]
    (tmp_path / "rows.csv").write_text("".join(mark.join(row) + "\n" for row in rows))
    got = read(tmp_path / "rows.csv", columns={"title": "title, or name"})
    assert got.items["title"].to_pylist() == ["Moby-Dick; or, The Whale"]


@pytest.mark.parametrize("name", ["user_id", "item_id"])
def test_an_empty_id_is_nobody(name: str, tmp_path: Path) -> None:
    """An empty cell of a text column would be one more user, who met what all unknowns met."""
    columns = {"user_id": ["ann", "ann", "bob", "bob"], "item_id": ["a", "b", "a", "b"]}
    columns[name][2] = "  "
    source = parquet(tmp_path, **columns, timestamp=None, title=["A", "B", "A", "B"])
    with pytest.raises(FellrayError, match=f"{name} is null or empty in 1 of 4 rows, in row 3 "):
        read(source)


def test_an_item_has_the_first_title_that_says_something(tmp_path: Path) -> None:
    got = read(parquet(tmp_path, title=["", "Heat", "Up", " ", "Down"]))
    assert dict(zip(*got.items.select(["item_id", "title"]).to_pydict().values(), strict=True)) == {
        10: "Heat",
        20: "Up",
        30: "Down",
    }
