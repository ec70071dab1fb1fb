"""RecBole's atomic files."""

from pathlib import Path
from typing import Any

import pytest

from fellray.platform import interactions as data
from fellray.platform.data_config import DataConfig
from fellray.platform.errors import FellrayError

INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t1193\t5\t978300760\n1\t661\t3\t978302109.5\n2\t661\t4\t9.7E8\n"
)
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tgenre:token_seq\n"
    "1193\tOne Flew Over the Cuckoo's Nest\t1975\tDrama\n"
    '661\tJames "and" the Giant Peach\t1996\tAnimation Children\'s\n'
)
USER = "user_id:token\tage:token\tgender:token\tweight:float\n1\t1\tF\t2.5\n2\t56\tM\t\n"


def atomic(folder: Path, inter: str = INTER, item: str = ITEM, user: str | None = None) -> Path:
    (folder / "ml.inter").write_text(inter, encoding="utf-8")
    (folder / "ml.item").write_text(item, encoding="utf-8")
    if user is not None:
        (folder / "ml.user").write_text(user, encoding="utf-8")
    return folder


def read(source: Path, **options: Any) -> data.Interactions:
    return data.read(DataConfig(source=str(source), k_core=1).model_copy(update=options))


def test_folder_and_inter_file_are_read_with_items_and_users(tmp_path: Path) -> None:
    got = read(atomic(tmp_path, user=USER))
    assert got.user_id.tolist() == [1, 1, 2]
    assert got.item_id.tolist() == [1193, 661, 661]
    assert got.timestamp.tolist() == [978300760, 978302109, 970000000]
    assert got.rating is not None
    assert got.rating.tolist() == [5, 3, 4]
    assert got.items.to_pydict() == {
        "item_id": [661, 1193],
        "title": ['James "and" the Giant Peach', "One Flew Over the Cuckoo's Nest"],
        "categories": ["Animation|Children's", "Drama"],
    }
    assert got.users is not None
    assert got.users.to_pydict() == {
        "user_id": [1, 2],
        "age": ["1", "56"],
        "gender": ["F", "M"],
        "weight": [2.5, None],
    }
    assert read(tmp_path / "ml.inter").item_id.tolist() == [1193, 661, 661]


def test_tokens_stay_tokens_where_one_is_no_plain_number(tmp_path: Path) -> None:
    """A leading zero belongs to the token: 007 is not 7."""
    inter = "user_id:token\titem_id:token\nann\t007\nann\t7\nbob\t7\n"
    item = "item_id:token\ttitle:token_seq\n7\tHeat\n007\tBond\n"
    got = read(atomic(tmp_path, inter, item))
    assert got.timestamp_kind == "order_only"
    assert got.user_id.tolist() == [0, 0, 1]
    assert got.item_id.tolist() == [0, 1, 1]
    assert got.items["source_id"].to_pylist() == ["007", "7"]
    assert got.items["title"].to_pylist() == ["Bond", "Heat"]


def test_categories_with_commas_as_in_recboles_amazon_sets(tmp_path: Path) -> None:
    item = (
        "item_id:token\ttitle:token\tcategories:token_seq\n"
        "661\tA\t'Video Games', 'PC', 'Kids' Games'\n1193\tB\t'Books'\n"
    )
    got = read(atomic(tmp_path, item=item))
    assert got.items["categories"].to_pylist() == ["Video Games|PC|Kids' Games", "Books"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    inter = INTER.replace("timestamp:float", "when:float")
    item = ITEM.replace("movie_title", "label").replace("genre", "kind")
    with pytest.raises(FellrayError, match=r"ml\.item: no column is called 'title'.*data\.columns"):
        read(atomic(tmp_path, inter, item))
    names = {"title": "label", "categories": "kind", "timestamp": "when"}
    got = read(tmp_path, columns=names)
    assert got.timestamp_kind == "unix_seconds"
    assert got.items["categories"].to_pylist() == ["Animation|Children's", "Drama"]


def test_items_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    item = "item_id:token\ttitle:token_seq\n1193\tNest\n661\t \n99\t\n"
    inter = INTER + "2\t1193\t1\t978300000\n2\t5\t1\t978300001\n"
    got = read(atomic(tmp_path, inter, item))
    assert got.item_id.tolist() == [1193, 1193]
    assert got.items["item_id"].to_pylist() == [1193]
    assert got.left_out == {
        "items_without_metadata": 1,
        "items_without_title": 1,
        "interactions": 3,
    }
    with pytest.raises(FellrayError, match=r"none of its 3 items has a title.*belong together"):
        read(atomic(tmp_path, inter, "item_id:token\ttitle:token_seq\n99\tUp\n"))


@pytest.mark.parametrize(
    ("inter", "item", "message"),
    [
        ("", ITEM, r"ml\.inter: is empty"),
        (INTER.splitlines(keepends=True)[0], ITEM, r"ml\.inter: has a header and no rows"),
        (
            "user_id\titem_id:token\n1\t2\n",
            ITEM,
            r"line 1: column 'user_id' has no type.*token_seq",
        ),
        ("user_id:token\titem_id:int\n1\t2\n", ITEM, r"line 1: column 'item_id:int' has no type"),
        ("user_id:token,item_id:token\n1,2\n", ITEM, r"line 1: .*has no type.*separated by tabs"),
        ("user_id:token\tuser_id:token\n1\t2\n", ITEM, "line 1: .*is there twice"),
        ("user_id:token\titem_id:token\n1\t2\n3\n", ITEM, r"ml\.inter: .*Row #3: Expected 2"),
        (INTER + "3\t661\tgood\t1\n", ITEM, r"ml\.inter: .*Row #5.*double.*'good'"),
        (INTER + "3\t661\t1\t\n", ITEM, "timestamp is null or empty in 1 of 4 rows, in row 4"),
        ("user_id:token\titem_id_list:token_seq\n1\t2 3\n", ITEM, "a row is a whole sequence"),
        (INTER, "", r"ml\.item: is empty"),
        (INTER, ITEM + "661\tAgain\t\t\n", r"ml\.item: item_id 661 occurs more than once"),
    ],
)
def test_bad_files_name_the_file_the_line_and_the_way_out(
    inter: str, item: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FellrayError, match=message):
        read(atomic(tmp_path, inter, item))


def test_missing_and_ambiguous_files(tmp_path: Path) -> None:
    (atomic(tmp_path) / "ml.item").unlink()
    with pytest.raises(FellrayError, match=r"ml\.item: does not exist.*reads titles"):
        read(tmp_path)
    (tmp_path / "ml.test.inter").write_text(INTER)
    with pytest.raises(FellrayError, match=r"several \.inter files \(ml\.inter, ml\.test\.inter\)"):
        read(tmp_path)
    with pytest.raises(FellrayError, match=r"none\.inter: does not exist"):
        read(tmp_path / "none.inter")
    with pytest.raises(FellrayError, match=r"leave data\.items out"):
        read(tmp_path / "ml.inter", items=Path("items.csv"))
