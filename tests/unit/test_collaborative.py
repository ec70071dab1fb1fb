"""Item-kNN against all cosines, BPR-MF by its seed and by what it tells apart."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fellray.platform import collaborative
from fellray.platform.collaborative import STAGES, fit_bpr_mf, fit_item_knn
from fellray.platform.errors import FellrayError
from fellray.platform.union import Union, mark

BPR = {"factors": 8, "learning_rate": 0.05, "regularization": 0.01, "epochs": 40}


def crowd(users: int = 30, items: int = 12) -> Union:
    """Users of two tastes, even items and odd ones; item 11 was met by nobody, item 4 twice by
    user 0."""
    draw = np.random.default_rng(7)
    met = [
        2 * draw.permutation(5)[: 2 + user % 3] + (user % 2 if user % 7 else draw.integers(2))
        for user in range(users)
    ]
    met[0] = np.array([4, 0, 4])
    offsets = np.cumsum([0, *map(len, met)])
    return Union(np.arange(users) * 10, offsets, np.concatenate(met).astype(np.int32), items)


def cosines(union: Union) -> np.ndarray:
    """Item after item; an item is nobody's and not its own neighbour."""
    seen = np.zeros((len(union.users), union.num_items))
    for user, (start, stop) in enumerate(zip(union.offsets, union.offsets[1:], strict=False)):
        seen[user, union.items[start:stop]] = 1
    found = np.zeros((union.num_items, union.num_items))
    for i in range(union.num_items):
        for j in range(union.num_items):
            both = np.sqrt(seen[:, i].sum() * seen[:, j].sum())
            if i != j and both:
                found[i, j] = (seen[:, i] * seen[:, j]).sum() / both
    return found


def alone(items: int) -> list[np.ndarray]:
    return [np.array([item]) for item in range(items)]


def test_all_neighbours_equal_brute_force() -> None:
    union = crowd()
    (scorer,) = fit_item_knn(union, {"neighbours": 11}, seed=0)
    histories = [np.array([0, 2, 2]), np.array([5]), np.array([11]), np.array([3, 8, 4])]
    similar = cosines(union)
    expected = np.stack([similar[np.unique(h)].sum(0) for h in histories])
    found = scorer(np.zeros(4, np.int64), histories)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected[3].max() > 0.3


def test_few_neighbours_are_the_nearest() -> None:
    union = crowd()
    (scorer,) = fit_item_knn(union, {"neighbours": 3}, seed=0)
    rows = scorer(np.zeros(12, np.int64), alone(12)).numpy()
    similar = cosines(union)
    for item in range(12):
        kept = np.flatnonzero(rows[item])
        assert len(kept) == min(3, np.count_nonzero(similar[item])), item
        np.testing.assert_allclose(rows[item, kept], similar[item, kept], atol=1e-6)
        others = np.delete(similar[item], kept)
        assert not len(kept) or similar[item, kept].min() >= others.max() - 1e-9


def test_marks_are_ones() -> None:
    marks = mark([np.array([1, 1, 2]), np.array([], np.int64)], 4).toarray()
    assert marks.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    assert mark([], 4).shape == (0, 4)


def test_bpr_tells_tastes_apart_and_goes_on() -> None:
    union = crowd()
    told = [scorer(np.arange(30), []) for scorer in fit_bpr_mf(union, BPR, seed=0)]
    assert len(told) == STAGES
    assert told[0].shape == (30, 12)

    def apart(scores: torch.Tensor) -> float:
        """Even users like even items: how often an own item is above one of the others."""
        even = scores[2:28:2, :10:2].mean(1) > scores[2:28:2, 1:10:2].mean(1)
        odd = scores[1:28:2, 1:10:2].mean(1) > scores[1:28:2, :10:2].mean(1)
        return float(torch.cat([even, odd]).double().mean())

    assert apart(told[-1]) > 0.8
    gaps = [float((b - a).abs().max()) for a, b in pairwise(told)]
    assert min(gaps) > 0  # every stage trains on, and leaves the scorers before it alone


def test_bpr_by_its_seed() -> None:
    union = crowd()

    def last(seed: int) -> torch.Tensor:
        *_, scorer = fit_bpr_mf(union, BPR, seed)
        return scorer(np.array([3, 0]), [])

    first = last(5)
    np.random.default_rng().random()
    assert torch.equal(first, last(5))
    assert not torch.equal(first, last(6))


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collaborative, "find_spec", lambda name: None)
    with pytest.raises(FellrayError, match=r"fellray\[baselines\]"):
        next(fit_item_knn(crowd(), {"neighbours": 3}, seed=0))
