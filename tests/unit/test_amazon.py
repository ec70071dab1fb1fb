"""Amazon reviews of 2018 and 2023."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fellray.jobs.prepare import prepare
from fellray.platform import interactions as data
from fellray.platform.additions import Batch
from fellray.platform.config import parse
from fellray.platform.data_config import DataConfig
from fellray.platform.encoder import load_tokenizer
from fellray.platform.errors import FellrayError
from fellray.platform.shards import Dataset
from fellray.serve.items import Items

HALO, PAD, LOST, BARE, SCRIPT = ("B00005NZ1G", "0700026657", "B000000001", "B000000002", "B3")


def of_2018(user: str, item: str, time: int, stars: float = 5.0) -> dict[str, Any]:
    return {
        **{"overall": stars, "verified": True, "reviewTime": "10 17, 2015", "reviewerID": user},
        **{"asin": item, "style": {"Format:": " Video Game"}, "reviewText": 'It\'s "fun"\n\\o/'},
        **{"summary": "Five Stars", "unixReviewTime": time},
    }


def meta_2018(item: str, title: str, *category: str) -> dict[str, Any]:
    return {"category": [*category], "title": title, "also_buy": [], "price": "$1", "asin": item}


REVIEWS = [
    of_2018("A1", HALO, 1445040000),
    of_2018("A1", PAD, 1444000000, 2.0),
    of_2018("A2", PAD, 1445040000),
    of_2018("A2", LOST, 1445040001),
    of_2018("A2", BARE, 1445040002),
    of_2018("A3", SCRIPT, 1445040003),
]
META = [
    meta_2018(PAD, ""),
    meta_2018(HALO, "Halo &amp; Friends  - Xbox", "Video Games", "Toys &amp; Games", "</span></a>"),
    meta_2018(PAD, "Pad &quot;Pro&quot;", "Video Games"),
    meta_2018(PAD, "Pad, again"),
    meta_2018(BARE, " "),
    meta_2018(SCRIPT, "var aPageStart = (new Date()).getTime();"),
    meta_2018("unmet", "Nobody wrote of it", "A|B"),
]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file


def read(source: Path, **options: Any) -> data.Interactions:
    return data.read(DataConfig(source=str(source), k_core=1).model_copy(update=options))


@pytest.mark.parametrize(
    ("reviews", "meta"),
    [
        ("Video_Games_5.json.gz", "meta_Video_Games.json.gz"),
        ("Video_Games.json", "meta_Video_Games.json"),
    ],
)
def test_2018_by_folder_and_by_file(reviews: str, meta: str, tmp_path: Path) -> None:
    file = write(tmp_path / reviews, REVIEWS)
    write(tmp_path / meta, META)
    for source in (tmp_path, file):
        got = read(source)
        assert got.user_id.tolist() == [0, 0, 1]
        assert got.items.to_pydict() == {
            "item_id": [0, 1, 2],
            "title": ['Pad "Pro"', "Halo & Friends - Xbox", "Nobody wrote of it"],
            "categories": ["Video Games", "Video Games|Toys & Games", "A/B"],
            "source_id": [PAD, HALO, "unmet"],
        }
        assert got.item_id.tolist() == [0, 1, 0]  # by time
        assert got.timestamp.tolist() == [1444000000, 1445040000, 1445040000]
        assert got.rating is not None
        assert got.rating.tolist() == [2, 5, 5]
        assert got.left_out == {
            "items_without_metadata": 1,
            "items_without_title": 2,
            "interactions": 3,
        }


def test_2023_orders_rows_of_one_second_by_its_milliseconds(tmp_path: Path) -> None:
    rows = [
        {"rating": 4.0, "title": "ok", "asin": "X1", "parent_asin": asin, "user_id": "AGK"}
        | {"timestamp": moment, "images": [], "helpful_vote": 0, "verified_purchase": True}
        for asin, moment in [("P2", 1676601581238), ("P1", 1676601581100), ("P3", 1676601580999)]
    ]
    meta = [
        {"main_category": "Games", "title": f"Game {n}", "parent_asin": f"P{n}", "categories": []}
        | {"details": {"Brand": {"a": [1]}}, "price": None, "videos": [{"url": "u"}]}
        for n in (1, 2, 3)
    ]
    meta[0]["categories"] = ["Video Games", "PC"]
    meta[1]["categories"] = None
    write(tmp_path / "Video_Games.jsonl.gz", rows)
    write(tmp_path / "meta_Video_Games.jsonl.gz", meta)
    got = read(tmp_path)
    assert got.items["source_id"].take(got.item_id).to_pylist() == ["P3", "P1", "P2"]
    assert got.timestamp.tolist() == [1676601580, 1676601581, 1676601581]
    assert got.items["categories"].to_pylist() == ["Video Games|PC", "", ""]
    assert not got.left_out


def test_metadata_can_lie_elsewhere(tmp_path: Path) -> None:
    reviews = write(tmp_path / "Games.json", REVIEWS)
    with pytest.raises(FellrayError, match=r"meta_Games\.json and the like\).*data\.items=<file>"):
        read(reviews)
    assert len(read(reviews, items=write(tmp_path / "products.json", META)).items) == 3
    with pytest.raises(FellrayError, match=r"none of its 5 items has a title in .*belong together"):
        read(reviews, items=write(tmp_path / "products.json", META[-1:]))


def broken(line: str) -> str:
    good = [json.dumps(row) for row in REVIEWS]
    return "\n".join([good[0], "", line, *good[1:]]) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (broken(json.dumps(REVIEWS[0])[:40]), r"line 3 is not JSON"),
        (broken(json.dumps(REVIEWS[0])[:-1] + "\n]"), r"line 3 is not JSON"),
        (broken("7"), "line 3 is no JSON object"),
        (broken('{"reviewerID": "A1"}'), "line 3 has no asin"),
        (broken(json.dumps(of_2018(" ", HALO, 1))), "line 3 has no reviewerID"),
        (broken(json.dumps({**REVIEWS[0], "asin": 7})), "line 3 has a asin that is no text"),
        (broken(json.dumps({**REVIEWS[0], "unixReviewTime": "1"})), "line 3 .*no number"),
        (broken(json.dumps({**REVIEWS[0], "unixReviewTime": 1.5})), "line 3 .*no whole number"),
        ("", "is empty; a JSON object per line"),
        ("\n \n", "is empty; a JSON object per line"),
        ("{'reviewerID': 'A1'}\n", "no file of Amazon reviews.*is no JSON object"),
        ('{"user": 1, "item": 2}\n', r"reviewerID and asin \(2018\) or user_id.*has item, user"),
    ],
)
def test_bad_lines_are_named(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "meta_Games.json", META)
    (tmp_path / "Games.json").write_text(text)
    with pytest.raises(FellrayError, match=message) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "Games.json"))


def test_damaged_files(tmp_path: Path) -> None:
    write(tmp_path / "meta_Games.json", META)
    whole = write(tmp_path / "Games.json.gz", REVIEWS * 500).read_bytes()
    (tmp_path / "Games.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FellrayError, match=r"Games\.json\.gz: is cut off or damaged after line \d"):
        read(tmp_path)
    (tmp_path / "Games.json.gz").write_bytes(b"hello")
    with pytest.raises(FellrayError, match=r"Games\.json\.gz: cannot be read .*download it again"):
        read(tmp_path)
    (tmp_path / "Games.json.gz").unlink()
    rows = json.dumps(REVIEWS[0]).encode() + b"\n"
    (tmp_path / "Games.json").write_bytes(rows + rows.replace(b"A1", b"\xe9"))
    with pytest.raises(FellrayError, match=r"Games\.json: line 2 is not JSON \('utf-8'"):
        read(tmp_path)
    write(tmp_path / "Games.json", REVIEWS)
    write(tmp_path / "meta_Games.json", [{"parent_asin": HALO, "title": "Halo"}])
    with pytest.raises(FellrayError, match=r"meta_Games\.json: line 1 has no asin"):
        read(tmp_path)
    write(tmp_path / "meta_Games.json", [{"asin": HALO, "title": "Halo", "category": [7]}])
    with pytest.raises(FellrayError, match="line 1 has a category that is no list of texts"):
        read(tmp_path)


def test_a_prepared_folder_keeps_the_asins_and_a_served_item_shows_its_own(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    rows = [of_2018(f"A{u}", f"B{(u + i) % 5}", 100 + i) for u in range(6) for i in range(4)]
    write(tmp_path / "Games.json", [*rows, of_2018("A0", LOST, 9)])
    write(tmp_path / "meta_Games.json", [meta_2018(f"B{i}", f"word0{i}") for i in range(5)])
    tree = {
        "data": {
            "path": str(tmp_path / "data"),
            "source": str(tmp_path),
            "k_core": 1,
            "partition": {"kind": "per_user"},
        },
        "model": {"name": str(tiny_encoder)},
    }
    config = parse(tree, "test")
    manifest = prepare(config)
    assert manifest["left_out"]["interactions"] == 1
    data = Dataset(tmp_path / "data")
    assert data.source_ids == ["B0", "B1", "B2", "B3", "B4"]
    items = Items(data, load_tokenizer(str(tiny_encoder)), config.model)
    assert json.loads(items.describe(3).model_dump_json())["source_id"] == "B3"
    later = items.extend(Batch(np.array([9]), ["x"], [()], data.vectors[:1]))
    assert "source_id" not in json.loads(later.describe(5).model_dump_json())
    assert later.describe(3).source_id == "B3"


def test_which_file_is_meant_must_be_clear(tmp_path: Path) -> None:
    write(tmp_path / "meta_Games.json", META)
    with pytest.raises(FellrayError, match=r"one file of reviews must lie beside.*there is none"):
        read(tmp_path)
    write(tmp_path / "Games.json", REVIEWS)
    write(tmp_path / "Games_5.json", REVIEWS)
    with pytest.raises(FellrayError, match=r"there is Games\.json, Games_5\.json.*data\.source"):
        read(tmp_path)
    assert len(read(tmp_path / "Games_5.json").user_id) == 3
    with pytest.raises(FellrayError, match=r"gone\.json\.gz: does not exist"):
        read(tmp_path / "gone.json.gz")
    with pytest.raises(FellrayError, match=r"leave data\.users out"):
        read(tmp_path / "Games.json", users=Path("users.csv"))
