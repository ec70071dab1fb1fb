"""Metrics of clicks, against scikit-learn and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, precision_score, roc_auc_score

from fellray.platform.click_score import NOTHING, pool_clicks, score_users


def draw(samples: int, users: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    user = np.sort(generator.integers(0, users, samples))
    logit = generator.normal(0, 1.2, samples).round(2)
    label = (generator.random(samples) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    return logit.astype(np.float32), label, user


def test_metrics_are_scikit_learns() -> None:
    logit, label, user = draw(3000, 40, 1)
    found = pool_clicks(score_users(logit, label, user, 40)).means()
    probability = 1 / (1 + np.exp(-logit.astype(np.float64)))
    assert found["auc"] == pytest.approx(roc_auc_score(label, probability), abs=2e-5)
    assert found["log_loss"] == pytest.approx(log_loss(label, probability), rel=1e-6)
    said = (probability >= 0.5).astype(int)
    wanted = precision_score(label, said, average="weighted")
    assert found["precision"] == pytest.approx(wanted, abs=1e-6)
    assert found["calibration"] == pytest.approx(probability.mean() / label.mean(), abs=1e-3)
    each = [
        (roc_auc_score(label[user == u], logit[user == u]), (user == u).sum())
        for u in range(40)
        if len(set(label[user == u])) == 2
    ]
    values, weights = zip(*each, strict=True)
    assert found["gauc"] == pytest.approx(np.average(values, weights=weights), abs=1e-9)


def test_calibration_by_hand() -> None:
    """Two samples at 0.25, one clicked; two at 0.75, both clicked: both bins are off by 0.25."""
    logit = np.log(np.array([1 / 3, 1 / 3, 3.0, 3.0]))
    found = pool_clicks(score_users(logit, np.array([0, 1, 1, 1]), np.zeros(4, int), 1)).means()
    assert found["ece"] == pytest.approx(0.25, abs=1e-3)
    assert found["calibration"] == pytest.approx(2 / 3, abs=1e-3)


def test_what_samples_do_not_define_is_left_out() -> None:
    assert NOTHING.means() == {}
    clicked = score_users(np.array([0.3, 1.0]), np.array([1, 1]), np.array([0, 0]), 2)
    assert clicked[1] is NOTHING
    assert "auc" not in clicked[0].means()
    assert "gauc" not in clicked[0].means()
    assert clicked[0].means()["log_loss"] > 0


@given(st.integers(1, 120), st.integers(1, 9), st.integers(0, 99))
def test_any_order_and_any_dealing_gives_the_same_bits(samples: int, users: int, seed: int) -> None:
    scores = score_users(*draw(samples, users, seed), users)
    whole = pool_clicks(scores)
    summed = NOTHING
    for one in scores[::-1]:
        summed = summed + one
    half = pool_clicks(scores[: users // 2]) + pool_clicks(scores[users // 2 :])
    for other in (summed, half):
        assert other.means() == whole.means()
        assert other.bins.tolist() == whole.bins.tolist()


def test_a_certain_and_wrong_answer_costs_a_finite_loss() -> None:
    (found,) = score_users(np.array([200.0]), np.array([0]), np.array([0]), 1)
    assert found.means()["log_loss"] == pytest.approx(200.0)
