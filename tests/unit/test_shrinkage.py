"""Shrinkage by hand."""

import pytest
import torch

from fellray.platform.aggregation import describe, reduce
from fellray.platform.shrinkage import Shrinkage, own_weights


def test_by_hand() -> None:
    """The mean is 0; squared distances 16, 1, 9 with a mean of 26 / 3."""
    theta = torch.tensor([[4.0], [-1.0], [-3.0]])
    meta = describe(1, ["a", "b", "c"], [1.0] * 3, [2, 2, 2], theta, theta)
    plan = Shrinkage(noise=0.5).plan(meta)
    own = [1 - 13 / 3 / 16, 0.0, 1 - 13 / 3 / 9]
    assert reduce(plan, theta)[:, 0].tolist() == pytest.approx([4 * own[0], 0.0, -3 * own[2]])
    assert plan.notes["shrunk_by"].tolist() == pytest.approx([1 - b for b in own])


def test_more_histories_less_noise() -> None:
    """A mean of 4 histories: who read 6 has two thirds of the noise, who read 2 the double."""
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    own = own_weights(gram, torch.tensor([2.0, 6.0]).double(), noise=0.3)
    assert own.tolist() == pytest.approx([1 - 0.6, 1 - 0.2])


def test_no_noise_keeps_everything_and_equal_clients_take_the_mean() -> None:
    theta = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    meta = describe(1, ["a", "b"], [1.0, 1.0], [1, 1], theta, theta)
    assert Shrinkage(noise=0).plan(meta).mixing_CC.tolist() == torch.eye(2).tolist()
    same = describe(1, ["a", "b"], [1.0, 1.0], [1, 1], theta[:1].repeat(2, 1), theta)
    assert Shrinkage(noise=0).plan(same).mixing_CC.tolist() == [[0.5, 0.5]] * 2


def test_nobody_left_is_a_plan_for_nobody() -> None:
    meta = describe(1, [], [], [], torch.empty(0, 2), torch.empty(0, 2))
    assert Shrinkage().plan(meta).mixing_CC.shape == (0, 0)
