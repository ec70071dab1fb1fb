"""Rankings: ties by item, filters, and the same as sorting everything."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fellray.serve.ranking import Choice, rank


def items(*scores: float, k: int = 3, **choice: list[int]) -> list[int]:
    sets = {name: np.array(indices, np.int64) for name, indices in choice.items()}
    (ranking,) = rank(torch.tensor([scores], dtype=torch.float32), [Choice(k, **sets)])
    assert ranking.scores.tolist() == [scores[i] for i in ranking.items]
    return ranking.items.tolist()


def test_equal_scores_stand_in_the_order_of_items() -> None:
    assert items(1, 2, 2, 2, 0) == [1, 2, 3]
    assert items(1, 1, 1, 1, 1) == [0, 1, 2]
    assert items(0, 1, 2, 1, 1) == [2, 1, 3]


def test_filters() -> None:
    assert items(5, 4, 3, 2, 1, only=[4, 1]) == [1, 4]
    assert items(5, 4, 3, 2, 1, without=[0, 2]) == [1, 3, 4]
    assert items(5, 4, 3, 2, 1, only=[0, 1], without=[0]) == [1]
    assert items(5, 4, 3, only=[1], without=[1]) == []
    assert items(5, 4, 3, only=[]) == []
    assert items(5, 4, 3, k=9) == [0, 1, 2]


def test_users_have_places_of_their_own_and_scores_are_left_alone() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    before = scores.clone()
    first, second = rank(scores, [Choice(1), Choice(3, without=np.array([0]))])
    assert (first.items.tolist(), second.items.tolist()) == ([2], [1, 2])
    assert torch.equal(scores, before)


@given(st.data())
def test_it_is_the_head_of_the_whole_order(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 30))
    few = st.integers(-2, 2).map(float)
    scores = data.draw(st.lists(few, min_size=size, max_size=size))
    without = data.draw(st.lists(st.integers(0, size - 1), max_size=size))
    k = data.draw(st.integers(1, size))
    left = [i for i in range(size) if i not in without]
    expected = sorted(left, key=lambda i: (-scores[i], i))[:k]
    assert items(*scores, k=k, without=without) == expected
