"""Promotions are a stack of rounds in a file, and keep their rounds on storage."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fellray.platform.errors import FellrayError
from fellray.platform.promotion import FILE, MOST, promote, read_promotion, roll_back
from fellray.platform.storage import Storage


def test_promote_and_roll_back(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert read_promotion(storage).served is None
    for round in (2, 5, 5, 3):
        assert promote(storage, round, lambda: [2, 3, 5]).served == round
    assert read_promotion(storage).rounds == (2, 5, 3)
    assert [roll_back(storage).served for _ in range(3)] == [5, 2, None]
    with pytest.raises(FellrayError, match="no round is promoted"):
        roll_back(storage)
    with pytest.raises(FellrayError, match="holds no round 7; committed rounds: 2, 3"):
        promote(storage, 7, lambda: [3, 2])
    for round in range(MOST + 4):
        promote(storage, round, lambda: range(99))
    assert read_promotion(storage).rounds == tuple(range(4, MOST + 4))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for text in ("{", "[]", '{"version": 2, "rounds": []}', '{"version": 1, "rounds": [-1]}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(FellrayError, match=r"serving\.json: is damaged"):
            read_promotion(storage)


def test_a_round_that_goes_meanwhile_is_not_promoted(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    promote(storage, 2, lambda: [2, 3])
    looks = iter([[2, 3], [2]])
    with pytest.raises(FellrayError, match="holds no round 3; committed rounds: 2"):
        promote(storage, 3, lambda: next(looks))
    assert read_promotion(storage).rounds == (2,)


def test_who_promotes_at_the_same_time_loses_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: promote(Storage(tmp_path), n, lambda: range(16)), range(MOST)))
    assert sorted(read_promotion(Storage(tmp_path)).rounds) == list(range(MOST))
