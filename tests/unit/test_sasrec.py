"""SASRec against a calculation place by place, its draws, and what it learns."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fellray.platform.sasrec import SelfAttention, draw_unmet, fit_sasrec
from fellray.platform.union import Union

SETTINGS = {
    "width": 16,
    "blocks": 2,
    "places": 6,
    "dropout": 0.2,
    "loss": "bce",
    "learning_rate": 0.01,
    "batch_size": 8,
    "epochs": 15,
}


def network(places: int = 5) -> SelfAttention:
    model = SelfAttention(7, 4, 2, places, torch.Generator().manual_seed(3))
    with torch.no_grad():  # large weights, and no bias that is nought
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(0, 0.6, generator=torch.Generator().manual_seed(number))
    return model


def norm(x_d: np.ndarray, layer: torch.nn.LayerNorm) -> np.ndarray:
    plain = (x_d - x_d.mean()) / math.sqrt(x_d.var() + layer.eps)
    return plain * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def apply(layer: torch.nn.Linear, x_d: np.ndarray) -> np.ndarray:
    return layer.weight.detach().numpy() @ x_d + layer.bias.detach().numpy()


def by_hand(model: SelfAttention, history: list[int]) -> np.ndarray:
    """Place after place; each looks at itself and at those before it, one by one."""
    width = model.items.embedding_dim
    size = len(history)
    x = [
        model.items.weight[item].detach().numpy() * math.sqrt(width)
        + model.positions.weight[size - 1 - at].detach().numpy()  # the newest has place 0
        for at, item in enumerate(history)
    ]
    for block in range(2):
        q, k, v = zip(
            *(np.split(apply(model.attend[block], norm(h, model.norms[2 * block])), 3) for h in x),
            strict=True,
        )
        for t in range(size):
            weights = np.exp([q[t] @ k[s] / math.sqrt(width) for s in range(t + 1)])
            x[t] = x[t] + sum(w * v[s] for s, w in enumerate(weights / weights.sum()))
        for t in range(size):
            hidden = apply(model.inner[block], norm(x[t], model.norms[2 * block + 1]))
            x[t] = x[t] + apply(model.outer[block], np.maximum(hidden, 0))
    return np.stack([norm(h, model.norms[-1]) for h in x])


def test_every_place_equals_a_calculation_by_hand() -> None:
    model = network()
    histories = [[3, 0, 6, 1], [2], [5, 5]]
    items_BL, sizes_B = model.pad([np.array(h, np.int32) for h in histories])
    out_BLd = model(items_BL, sizes_B, 0.0, None).detach().numpy()
    for row, history in enumerate(histories):
        np.testing.assert_allclose(out_BLd[row, : len(history)], by_hand(model, history), atol=2e-5)


def test_no_place_sees_what_comes_after() -> None:
    model = network()
    items_BL, sizes_B = model.pad([np.array([3, 0, 6, 1]), np.array([3, 0, 6, 2])])
    first, second = model(items_BL, sizes_B, 0.0, None)
    assert torch.equal(first[:3], second[:3])
    assert not torch.allclose(first[3], second[3])


def test_scores_follow_the_newest_places_alone() -> None:
    model = network(places=3)
    some = [np.array([1, 2, 3, 4]), np.array([6, 2, 3, 4])]
    one, other = model.score(np.zeros(2, np.int64), some)
    assert torch.equal(one, other)
    alone = model.score(np.zeros(1, np.int64), some[:1])[0]
    expected = by_hand(model, [2, 3, 4])[-1] @ model.items.weight[:-1].detach().numpy().T
    np.testing.assert_allclose(alone, expected, atol=2e-5)


def test_what_is_drawn_was_not_met() -> None:
    met = [np.array([0, 1, 2], np.int32), np.array([4], np.int32), np.arange(5, dtype=np.int32)]
    user_M = torch.tensor([0] * 200 + [1] * 200 + [2] * 50)
    drawn = draw_unmet(met, user_M, 5, torch.Generator().manual_seed(0))
    assert set(drawn[:200].tolist()) == {3, 4}
    assert set(drawn[200:400].tolist()) == {0, 1, 2, 3}
    assert set(drawn[400:].tolist()) <= set(range(5))  # who has met all
    counts = torch.bincount(drawn[200:400]).tolist()
    assert min(counts[:4]) > 30  # of 50 expected


def cycles() -> Union:
    """Each of 24 users walks on through 10 items in a circle."""
    items = np.concatenate([(np.arange(6) + user) % 10 for user in range(24)]).astype(np.int32)
    return Union(np.arange(24), np.arange(25) * 6, items, 10)


def last(seed: int, **changes: object) -> Tensor:
    histories = [np.arange(item - 3, item + 2) % 10 for item in range(10)]
    *_, scorer = fit_sasrec(cycles(), SETTINGS | changes, seed)
    return scorer(np.zeros(10, np.int64), histories)


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_it_learns_what_comes_next(loss: str) -> None:
    scores = last(0, loss=loss, epochs=45)
    for item in range(10):  # what was met is masked, as in an evaluation
        scores[item, (np.arange(item - 3, item + 2) % 10).tolist()] = -torch.inf
    found = scores.argmax(1)
    assert int((found == (torch.arange(10) + 2) % 10).sum()) >= 8  # by chance: one


def test_a_seed_is_a_training() -> None:
    first = last(1)
    torch.manual_seed(123)
    torch.rand(5)
    assert torch.equal(first, last(1))
    assert not torch.equal(first, last(2))


def test_a_scorer_stays_what_it_was() -> None:
    histories = [np.array([1, 2])]
    stages = fit_sasrec(cycles(), SETTINGS, 0)
    early = next(stages)
    before = early(np.zeros(1, np.int64), histories)
    next(stages)
    assert torch.equal(before, early(np.zeros(1, np.int64), histories))
