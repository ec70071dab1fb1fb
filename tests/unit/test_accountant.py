"""Epsilon against accountants written anew from the papers; what is spent; when none is stated."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fellray.platform.accountant import Spending, compute_epsilon, open_account, sent_besides
from fellray.platform.config import RunConfig, parse
from fellray.platform.errors import FellrayError
from fellray.platform.privacy_config import GaussianNoise, NoPrivacy, PaperLikeNoise

DELTA = 1e-5
KNOWN = [
    (1.0, 1.0, 1, 4.37718),
    (1.0, 2.0, 30, 14.82994),
    (1.0, 8.0, 1000, 23.99536),
    (0.5, 1.0, 1, 3.53400),
    (0.5, 8.0, 1000, 9.91228),
    (0.1, 1.0, 1000, 25.20471),
    (0.1, 2.0, 30, 1.29481),
    (0.01, 1.0, 1, 0.19945),
    (0.01, 1.0, 1000, 1.82893),
]
"""Sampling rate, multiplier, rounds, and what Google's dp-accounting 0.6.0 says at delta 1e-5:
PLDAccountant with cells of 1e-3, which rounds up. It wants attrs < 24, which is not ours."""
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
    # a loss past what a float holds is one that nobody has: infinity is its place
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
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


@pytest.mark.parametrize(("rate", "multiplier", "rounds", "known"), KNOWN)
def test_epsilon_is_that_of_another_library(
    rate: float, multiplier: float, rounds: int, known: float
) -> None:
    ours = compute_epsilon(multiplier, DELTA, rounds, rate)
    assert known <= ours <= 1.05 * known


GRID = [(0.01, 1.0, 100), (0.1, 4.0, 1), (0.1, 1.0, 10), (0.5, 4.0, 100)]
LONG = [
    (rate, m, t) for rate in (0.01, 0.03, 0.3, 0.9) for m in (0.7, 2.0, 8.0) for t in (3, 30, 1000)
]


@pytest.mark.parametrize(
    "grid", [pytest.param(GRID, id="few"), pytest.param(LONG, id="many", marks=pytest.mark.long)]
)
def test_epsilon_with_poisson_sampling_is_that_of_a_second_accountant(
    grid: list[tuple[float, float, int]],
) -> None:
    for rate, multiplier, rounds in grid:
        ours = compute_epsilon(multiplier, DELTA, rounds, rate)
        truth = poisson(rate, multiplier, rounds, DELTA, 2 * ours + 12)
        assert truth <= ours <= 1.05 * truth, (rate, multiplier, rounds, ours / truth)


def test_the_second_accountant_is_right_where_the_truth_is_known() -> None:
    for multiplier, rounds in [(1.0, 1), (2.0, 30)]:
        truth = exact(multiplier, rounds, DELTA)
        assert poisson(1 - 1e-9, multiplier, rounds, DELTA, 3 * truth + 12) == pytest.approx(
            truth, rel=1e-3
        )


def test_nothing_is_spent_before_the_first_round_and_more_rounds_cost_more() -> None:
    assert compute_epsilon(1.0, DELTA, 0) == 0.0
    costs = [compute_epsilon(2.0, DELTA, rounds) for rounds in (1, 2, 4)]
    assert 0 < costs[0] < costs[1] < costs[2] < 4 * costs[0]


# --- spending -----------------------------------------------------------------------------------


def gaussian(**own: object) -> GaussianNoise:
    return GaussianNoise.model_validate({"clip": 0.5, "sigma": 4.0} | own)


def test_the_multiplier_counts_what_neighbours_may_differ_in() -> None:
    once = Spending(gaussian(), "client")
    once.take_part(["a"])
    assert once.epsilon == compute_epsilon(2.0, DELTA)  # replaced: twice the clip away
    assert once.tree()["sensitivity"] == 1.0
    left_out = Spending(gaussian(neighbours="add_or_remove"), "client")
    left_out.take_part(["a"])
    assert left_out.epsilon == compute_epsilon(4.0, DELTA)
    assert left_out.tree()["sensitivity"] == 0.5


def test_a_noised_loss_counts_too() -> None:
    spending = Spending(gaussian(loss_clip=10.0, loss_sigma=2.0), "client")
    spending.take_part(["a"])
    # (2 / 4)^2 + (1 / 2)^2 = 1 / 2: as two rounds of multiplier 2
    assert spending.tree()["noise_multiplier"] == pytest.approx(math.sqrt(2))
    assert spending.epsilon == pytest.approx(compute_epsilon(2.0, DELTA, 2))


def test_a_client_spends_in_the_rounds_that_it_is_asked_in() -> None:
    spending = Spending(gaussian(), "user")
    for asked in (["a", "b"], ["a", "c"], ["a"]):
        spending.take_part(asked)
    assert spending.row() == {
        "epsilon": compute_epsilon(2.0, DELTA, 3),
        "delta": DELTA,
        "most_rounds": 3,
    }
    statement = spending.tree()["statement"]
    assert "delta 1e-05, per user" in statement
    assert "replaced by any other" in statement
    assert "does not know the seed" in statement
    assert "does not know" not in Spending(gaussian(key="/k"), "user").describe()


def test_the_budget_ends_the_run_before_the_round_that_would_exceed_it() -> None:
    budget = compute_epsilon(2.0, DELTA, 2) + 1e-6
    spending = Spending(gaussian(epsilon=budget), "client")
    spending.check_budget()
    asked = {1: ["a"], 2: ["b", "c"], 3: ["a", "b"], 4: ["c"], 5: ["b"], 6: ["d"]}
    trained = []
    for round in spending.affordable(range(7), asked.__getitem__):
        trained.append(round)
        spending.take_part(asked.get(round, []))
    assert trained == [0, 1, 2, 3, 4]
    assert spending.stopped_before == 5
    assert spending.epsilon is not None
    assert spending.epsilon <= budget
    assert "stopped before round 5" in str(spending.stop)
    assert spending.tree()["stopped_before"] == 5


def test_without_a_budget_every_round_is_affordable() -> None:
    for stage in (NoPrivacy(), gaussian(), PaperLikeNoise(scale=0.1)):
        spending = Spending(stage, "client")
        spending.check_budget()
        assert list(spending.affordable(range(3, 6), lambda _: ["a"])) == [3, 4, 5]
        assert spending.stop is None


def test_a_budget_below_one_round_is_refused() -> None:
    with pytest.raises(FellrayError, match=r"privacy\.epsilon=0\.1: one round costs 2\.00"):
        Spending(gaussian(epsilon=0.1), "client").check_budget()


def test_no_epsilon_where_something_else_leaves_or_nothing_is_clipped() -> None:
    refused = [
        Spending(NoPrivacy(), "client"),
        Spending(PaperLikeNoise(scale=0.1), "client"),
        Spending(gaussian(), "client", SPLIT),
    ]
    for spending in refused:
        spending.take_part(["a"])
        assert spending.epsilon is None
        assert spending.tree()["epsilon"] is None
        assert spending.tree()["no_epsilon_because"] == list(spending.refusals) != []
    assert "no formal epsilon" in refused[1].describe()
    assert SPLIT[0] in refused[2].describe()
    with pytest.raises(FellrayError, match="no epsilon is stated for this run, since every step"):
        Spending(gaussian(epsilon=3.0), "client", SPLIT).check_budget()


def test_a_run_that_is_split_states_none_and_its_records_restore_what_was_spent() -> None:
    config = parse({"method": {"kind": "fedavg"}, "privacy": {"clip": 0.5, "sigma": 4}}, "test")
    rows = [
        {"round": 0},
        {"losses": {"a": None, "b": None}, "late": ["c"]},
        {"losses": {"a": 1.0}, "late": ["c"]},
        {"losses": {"b": 1.0, "c": 1.0}},
    ]
    spending = open_account(config, rows)
    assert spending.most == 3, "who was late has sent its update too"
    assert spending.epsilon is None
    assert "activations" in spending.tree()["no_epsilon_because"][0]
    assert spending.tree()["unit"] == "client"
    per_user = parse({"data": {"partition": {"kind": "per_user"}}}, "test")
    assert open_account(per_user).tree()["mechanism"] == "none"
    assert sent_besides(RunConfig())


def test_a_run_that_goes_on_from_another_does_not_count_its_rounds_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fellray.platform.accountant.sent_besides", lambda _: ())
    config = parse({"method": {"kind": "fedavg"}, "privacy": {"clip": 0.5, "sigma": 4}}, "test")
    assert open_account(config).epsilon == 0.0
    assert open_account(config, continues=True).epsilon is None


def test_a_method_that_reads_losses_needs_them_noised() -> None:
    with pytest.raises(FellrayError, match=r"method fellrec looks at .* privacy\.loss_clip"):
        parse({"privacy": {"clip": 1, "sigma": 1}}, "test")
    noised = parse({"privacy": {"clip": 1, "sigma": 1, "loss_clip": 9, "loss_sigma": 2}}, "test")
    assert isinstance(noised.privacy, GaussianNoise)
    parse({"privacy": {"kind": "paper_like", "scale": 0.1}}, "test")
    with pytest.raises(FellrayError, match=r"train\.share=none"):
        parse({"privacy": {"kind": "paper_like", "scale": 0.1}, "train": {"share": "none"}}, "test")
    with pytest.raises(FellrayError, match="loss_clip and loss_sigma go together"):
        parse({"privacy": {"clip": 1, "sigma": 1, "loss_clip": 9}}, "test")
