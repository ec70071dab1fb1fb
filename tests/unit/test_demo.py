"""The demo set: its catalogue, its size, its stated shape, and its bytes."""

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fellray.platform import demo

HERE = Path(__file__).parent
ROWS, ITEMS = demo.make(0)
USER, ITEM = ROWS["user_id"].to_numpy(), ROWS["item_id"].to_numpy()


def digest(seed: int) -> str:
    rows, items = demo.make(seed)
    arrays = [rows[name].to_numpy().tobytes() for name in rows.column_names]
    texts = items["title"].to_pylist() + items["categories"].to_pylist()
    return hashlib.sha256(b"".join([*arrays, "\n".join(texts).encode()])).hexdigest()


def test_catalogue_has_real_looking_titles_once_each_with_known_genres() -> None:
    titles = ITEMS["title"].to_pylist()
    assert len(titles) >= 400
    assert len(set(titles)) == len(titles)
    assert [t for t in titles if not re.fullmatch(r"\S.* \((19|20)\d\d\)", t)] == []
    genres = [row.split("|") for row in ITEMS["categories"].to_pylist()]
    assert all(row == sorted(set(row)) for row in genres)
    assert len({genre for row in genres for genre in row}) == 17  # a misspelling would be an 18th


def test_size_and_schema() -> None:
    assert ROWS.schema.names == ["user_id", "item_id", "timestamp", "seq"]
    lengths = np.bincount(USER)
    assert len(lengths) == 800
    assert lengths.min() >= 15
    assert lengths.max() <= 40
    assert lengths.mean() == pytest.approx(25, abs=0.5)


def test_an_item_at_most_once_per_user_and_time_runs_forward() -> None:
    assert len(np.unique(USER * 10_000 + ITEM)) == len(USER)
    same = USER[1:] == USER[:-1]
    assert (np.diff(USER) >= 0).all()
    assert (np.diff(ROWS["timestamp"].to_numpy())[same] >= 0).all()
    assert (np.diff(ROWS["seq"].to_numpy())[same] == 1).all()


def test_popular_items_take_their_share() -> None:
    counts = np.sort(np.bincount(ITEM, minlength=ITEMS.num_rows))[::-1]
    assert counts[:55].sum() > 0.35 * counts.sum()  # a tenth of the items; 10 % if all were equal


@pytest.mark.parametrize(("part", "lag"), [("sequence", 1), ("taste", 10)])
def test_each_part_of_the_model_brings_like_films_together(
    monkeypatch: pytest.MonkeyPatch, part: str, lag: int
) -> None:
    whole = likeness_at(ITEM, lag)
    monkeypatch.setattr(demo, "_MODEL", replace(demo._MODEL, **{part: 0.0}))
    without = likeness_at(demo.make(0)[0]["item_id"].to_numpy(), lag)
    assert whole > 1.1 * without


def likeness_at(item: np.ndarray, lag: int) -> float:
    """Mean cosine of the genres of a user's films `lag` picks apart (lengths do not change)."""
    likeness_II = demo._cosines(demo._genre_rows(ITEMS["categories"].to_pylist()))
    same = USER[lag:] == USER[:-lag]
    return float(likeness_II[item[lag:], item[:-lag]][same].mean())


def test_same_seed_same_bytes_here_and_in_another_process() -> None:
    assert digest(3) == digest(3) != digest(4)
    code = "from test_demo import digest; print(digest(3))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )
    assert other.stdout.strip() == digest(3)
