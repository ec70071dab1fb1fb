"""Promotions are a stack of rounds in a file, and keep their rounds on storage."""

from pathlib import Path

import pytest

from fellray.platform.errors import FellrayError
from fellray.platform.promotion import FILE, MOST, promote, read_promotion, roll_back
from fellray.platform.storage import Storage


def test_promote_and_roll_back(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert read_promotion(storage).served is None
    for round in (2, 5, 5, 3):
        assert promote(storage, round, [2, 3, 5]).served == round
    assert read_promotion(storage).rounds == (2, 5, 3)
    assert [roll_back(storage).served for _ in range(3)] == [5, 2, None]
    with pytest.raises(FellrayError, match="no round is promoted"):
        roll_back(storage)
    with pytest.raises(FellrayError, match="holds no round 7; committed rounds: 2, 3"):
        promote(storage, 7, [3, 2])
    for round in range(MOST + 4):
        promote(storage, round, range(99))
    assert read_promotion(storage).rounds == tuple(range(4, MOST + 4))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for text in ("{", "[]", '{"version": 2, "rounds": []}', '{"version": 1, "rounds": [-1]}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(FellrayError, match=r"serving\.json: is damaged"):
            read_promotion(storage)
