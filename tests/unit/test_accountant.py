"""Epsilon against accountants written anew from the papers; what is spent; when none is stated."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fellray.platform.accountant import Spending, compute_epsilon, open_account, sent_besides
from fellray.platform.config import GaussianNoise, NoPrivacy, PaperLikeNoise, RunConfig, parse
from fellray.platform.errors import FellrayError

DELTA = 1e-5
KNOWN = ()
SPLIT = ("every step sends activations",)


def delta_of_gaussian(epsilon: float, mu: float) -> float:
    """Balle and Wang, ICML 2018, theorem 8: exact, for sensitivity / deviation = mu."""
    return float(
        norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    )


def exact(multiplier: float, rounds: int, delta: float) -> float:
    """Rounds of Gaussian mechanisms are one whose mu is the root of the sum of squares (Dong, Roth
    and Su 2019, corollary 3.3)."""
    mu = math.sqrt(rounds) / multiplier
    return float(brentq(lambda e: delta_of_gaussian(e, mu) - delta, 0.0, mu * mu + 20 * mu + 1))


def poisson(rate: float, multiplier: float, rounds: int, delta: float, widest: float) -> float:
    """The privacy loss of the sampled Gaussian mechanism, added up by FFT: the larger of the two
    directions (Koskela, Jälkö and Honkela, AISTATS 2020), each loss at the middle of its cell."""
    half = 2**16
    step = widest / half
    edges = (np.arange(-half, half + 1) - 0.5) * step
    found = []
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.maximum(np.expm1(np.abs(edges)), 0) * np.sign(edges)
        inside = np.where(edges < 0, np.expm1(edges), inside)
        at = np.log1p(inside / rate) * multiplier**2 + 0.5  # where the loss is an edge's
        at = np.where(inside > -rate, at, -np.inf)
    bare, moved = norm.cdf(at, scale=multiplier), norm.cdf(at - 1, scale=multiplier)
    leaving = (1 - rate) * bare + rate * moved
    cells_leave = np.diff(leaving)
    cells_join = np.diff(bare)[::-1]  # loss of the other direction: the same with the other sign
    for cells, mirrored in ((cells_leave, False), (cells_join, True)):
        shift = 1 if mirrored else 0  # the grid's middle is not its centre
        ring = np.roll(cells, half + shift)
        total = np.fft.irfft(np.fft.rfft(ring) ** rounds, 2 * half)
        total = np.maximum(np.roll(total, half), 0)
        loss = np.arange(-half, half) * step

        def delta_at(epsilon: float, total: np.ndarray = total, loss: np.ndarray = loss) -> float:
            over = loss > epsilon
            return float((total[over] * -np.expm1(epsilon - loss[over])).sum())

        found.append(float(brentq(lambda e: delta_at(e) - delta, 0.0, widest * 0.99)))
    return max(found)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_epsilon_without_sampling_is_the_exact_one_from_above(delta: float) -> None:
    for multiplier, rounds in itertools.product([0.5, 1.0, 4.0, 30.0], [1, 10, 100, 1000]):
        truth = exact(multiplier, rounds, delta)
        ours = compute_epsilon(multiplier, delta, rounds)
        assert truth <= ours <= 1.05 * truth, (multiplier, rounds)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_epsilon_with_poisson_sampling_is_that_of_a_second_accountant(rate: float) -> None:
    for multiplier, rounds in itertools.product([1.0, 2.0, 8.0], [1, 30, 300]):
        ours = compute_epsilon(multiplier, DELTA, rounds, rate)
        truth = poisson(rate, multiplier, rounds, DELTA, 2 * ours + 12)
        assert truth <= ours <= 1.05 * truth, (multiplier, rounds, truth, ours)


def test_the_second_accountant_is_right_where_the_truth_is_known() -> None:
    for multiplier, rounds in [(1.0, 1), (2.0, 30)]:
        truth = exact(multiplier, rounds, DELTA)
        assert poisson(1 - 1e-9, multiplier, rounds, DELTA, 3 * truth + 12) == pytest.approx(
            truth, rel=1e-3
        )
