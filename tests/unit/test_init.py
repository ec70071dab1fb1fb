"""A first config: which column is taken for what, and a file that can be read again."""

from pathlib import Path

import pytest

from fellray.jobs.init import match_columns, write_config
from fellray.platform import config as configs


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (
            "stars,book_title,bought_at,customer_id,isbn,country",
            "user_id=customer_id item_id=isbn title=book_title timestamp=bought_at rating=stars",
        ),
        ("userId,movieId,rating,timestamp", "user_id=userId item_id=movieId timestamp rating"),
        ("user_id,parent_asin,rating,timestamp", "user_id item_id=parent_asin timestamp rating"),
        (
            "reviewerID,asin,overall,unixReviewTime",
            "user_id=reviewerID item_id=asin timestamp=unixReviewTime rating=overall",
        ),
        (
            "Customer Name,Customer ID,Product Name,Product SKU,Order Date",
            "user_id=Customer ID;item_id=Product SKU;title=Product Name;timestamp=Order Date",
        ),
        ("user,item,item_id,name", "user_id=user item_id=item title=name"),
        ("usr_id,itm,titles", "user_id=usr_id item_id=itm title=titles"),
        ("who,what,when", ""),
        ("", ""),
    ],
)
def test_columns_are_known_by_their_usual_names(header: str, found: str) -> None:
    pairs = [pair.partition("=") for pair in found.split(";" if ";" in found else None)]
    assert match_columns(header.split(",")) == {ours: its or ours for ours, _, its in pairs}


def test_no_column_is_taken_twice() -> None:
    found = match_columns(["user_item_title", "title"])
    assert sorted(found.values()) == sorted(set(found.values()))


@pytest.mark.parametrize("file", ["März Käufe.csv", 'a"b.csv', "...csv", "shop.2024.csv"])
def test_any_file_name_gives_a_config_that_can_be_read(file: str, tmp_path: Path) -> None:
    source = tmp_path / file
    source.write_text("customer_id;isbn;book title\n1;2;Dune\n", encoding="utf-8")
    columns = write_config(tmp_path / "shop.yaml", str(source), None)
    config = configs.load(tmp_path / "shop.yaml", [])
    assert config.data.source == str(source)
    assert config.data.columns == columns
    assert columns == {"user_id": "customer_id", "item_id": "isbn", "title": "book title"}


@pytest.mark.parametrize("file", ["Games_5.json.gz", "ml-1m.inter"])
def test_files_whose_columns_are_known_need_no_column_map(file: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    assert write_config(tmp_path / "shop.yaml", str(tmp_path / file), Path("meta.json")) == {}
    config = configs.load(tmp_path / "shop.yaml", [])
    assert config.name == file.split(".")[0]
    assert config.data.items == Path("meta.json")
    assert config.data.columns == {}
