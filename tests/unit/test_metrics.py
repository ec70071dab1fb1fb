"""Full-ranking metrics against loops written from the definitions, and balance by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fellray.platform.metrics import CUTOFFS, Evaluator, Score, balance, score

EXACT = 2.0**-32  # what one user's value is rounded to


def ranks(row, seen, truth):
    """item -> rank, from the definition: 1 + how many open items stand before it."""
    open_items = [i for i in range(len(row)) if i in truth or i not in seen]
    return {
        i: 1 + sum(row[j] > row[i] or (row[j] == row[i] and j < i) for j in open_items)
        for i in open_items
    }


def reference(scores, seen, truth):
    """Every metric with plain loops over users, items and cutoffs."""
    totals, users = {}, 0
    lists = {k: set() for k in CUTOFFS}
    for row, hidden, relevant in zip(scores, map(set, seen), map(set, truth), strict=True):
        if not relevant:
            continue
        users += 1
        rank = ranks(row, hidden, relevant)
        for k in CUTOFFS:
            lists[k] |= {i for i, place in rank.items() if place <= k}
            places = sorted(rank[i] for i in relevant if rank[i] <= k)
            ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(relevant)) + 1))
            values = {
                "recall": len(places) / len(relevant),
                "ndcg": sum(1 / math.log2(place + 1) for place in places) / ideal,
                "mrr": 1 / places[0] if places else 0.0,
                "hit": 1.0 if places else 0.0,
            }
            for metric, value in values.items():
                totals[f"{metric}@{k}"] = totals.get(f"{metric}@{k}", 0.0) + value
    means = {name: total / users for name, total in totals.items()}
    if users:
        means |= {f"coverage@{k}": len(lists[k]) / len(scores[0]) for k in CUTOFFS}
    return means


@st.composite
def rankings(draw):
    """Few distinct scores (hence ties), -inf among them, lists that repeat and overlap."""
    users, items = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    scores = rng.integers(levels, size=(users, items)).astype(np.float32) / levels
    scores[rng.random(scores.shape) < draw(st.sampled_from([0.0, 0.3]))] = -np.inf
    width = draw(st.sampled_from([1, 3, 60]))
    seen = [rng.integers(items, size=rng.integers(width * 2 + 1)) for _ in range(users)]
    truth = [rng.integers(items, size=rng.integers(width + 1)) for _ in range(users)]
    return scores, seen, truth


@given(rankings())
@settings(max_examples=300, deadline=None)
def test_equals_the_loops(case):
    scores, seen, truth = case
    means = score(torch.from_numpy(scores), seen, truth).means()
    expected = reference(scores.tolist(), [s.tolist() for s in seen], [t.tolist() for t in truth])
    assert means.keys() == expected.keys()
    for name, value in expected.items():
        assert means[name] == pytest.approx(value, abs=EXACT), name


@given(rankings(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_chunks_of_users_change_nothing(case, size):
    scores, seen, truth = case
    evaluator = Evaluator(scores.shape[1])
    for start in range(0, len(scores), size):
        chunk = slice(start, start + size)
        evaluator.add(torch.from_numpy(scores[chunk]), seen[chunk], truth[chunk])
    assert evaluator.score() == score(torch.from_numpy(scores), seen, truth)


def test_one_user_by_hand():
    # Order by score: 4 (masked), 1, 3, 0, 2, 5; the truth {3, 2} stands at ranks 2 and 4.
    scores = torch.tensor([[0.3, 0.8, 0.2, 0.5, 0.9, 0.1]])
    means = score(scores, [np.array([4])], [np.array([3, 2])]).means()
    dcg = 1 / math.log2(3) + 1 / math.log2(5)
    assert means["recall@5"] == 1
    assert means["hit@5"] == 1
    assert means["mrr@5"] == 0.5
    assert means["ndcg@5"] == pytest.approx(dcg / (1 + 1 / math.log2(3)), abs=EXACT)
    assert means["coverage@5"] == pytest.approx(5 / 6)


def test_a_hit_behind_the_cutoff_counts_only_further_down():
    scores = -torch.arange(30.0)[None]
    means = score(scores, [np.array([], int)], [np.array([5])]).means()
    assert (means["mrr@5"], means["hit@5"], means["recall@5"], means["ndcg@5"]) == (0, 0, 0, 0)
    assert means["mrr@10"] == pytest.approx(1 / 6, abs=EXACT)
    assert means["ndcg@10"] == pytest.approx(1 / math.log2(7), abs=EXACT)


def test_ties_go_to_the_smaller_index():
    flat = torch.zeros(1, 30)
    nothing = [np.array([], int)]
    assert score(flat, nothing, [np.array([3])]).means()["mrr@5"] == 0.25
    assert score(flat, nothing, [np.array([5])]).means()["mrr@5"] == 0
    assert score(flat, [np.array([0, 1])], [np.array([5])]).means()["mrr@5"] == 0.25


def test_more_truth_than_places_can_still_be_perfect():
    scores = -torch.arange(50.0)[None]
    means = score(scores, [np.array([], int)], [np.arange(30)]).means()
    assert means["ndcg@5"] == means["ndcg@20"] == 1
    assert means["recall@20"] == pytest.approx(20 / 30, abs=EXACT)


def test_truth_wins_over_seen_and_may_be_all_that_is_left():
    scores = torch.tensor([[5.0, 4.0, 3.0, -torch.inf]])
    result = score(scores, [np.arange(4)], [np.array([3])])
    assert result.means()["mrr@5"] == 1
    assert result.means()["coverage@20"] == 0.25


def test_repeats_in_seen_and_truth_count_once():
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    once = score(scores, [np.array([0])], [np.array([1])])
    assert score(scores, [np.array([0, 0])], [np.array([1, 1, 1])]) == once
    assert once.means()["recall@5"] == 1


def test_users_without_truth_are_skipped():
    scores = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    nothing = np.array([], int)
    both = score(scores, [nothing, nothing], [nothing, np.array([0])])
    assert both == score(scores[1:], [nothing], [np.array([0])])
    assert both.users == 1
    assert score(scores[:1], [nothing], [nothing]).means() == {}


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        score(torch.tensor([[1.0, float("nan")]]), [np.array([1])], [np.array([0])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type(dtype):
    scores = torch.tensor(np.random.default_rng(0).standard_normal((20, 50))).to(dtype)
    truth = [np.array([user, user + 25]) for user in range(20)]
    seen = [np.array([user + 1]) for user in range(20)]
    means = score(scores, seen, truth).means()
    expected = reference(scores.double().tolist(), [s.tolist() for s in seen], truth)
    assert means == pytest.approx(expected, abs=EXACT)


def test_recbole_formulas_on_hit_matrices():
    """RecBole works on a hit matrix and the number of relevant items; so do these formulas."""
    rng = np.random.default_rng(1)
    scores = rng.permuted(np.tile(np.arange(60.0), (40, 1)), axis=1)
    truth = [rng.choice(60, size=rng.integers(1, 30), replace=False) for _ in range(40)]
    order = np.argsort(-scores, axis=1)[:, :20]
    hit = np.array([np.isin(row, own) for row, own in zip(order, truth, strict=True)])
    relevant = np.array([len(own) for own in truth])

    recall = hit.cumsum(1) / relevant[:, None]
    hit_ratio = hit.cumsum(1) > 0
    first = hit.argmax(1)
    mrr = np.zeros(hit.shape)
    for user in np.flatnonzero(hit.any(1)):
        mrr[user, first[user] :] = 1 / (first[user] + 1)
    gains = 1 / np.log2(np.arange(2, 22))
    ideal = np.tile(gains.cumsum(), (40, 1))
    for user, length in enumerate(np.minimum(relevant, 20)):
        ideal[user, length:] = ideal[user, length - 1]
    ndcg = (hit * gains).cumsum(1) / ideal

    means = score(torch.from_numpy(scores), [np.array([], int)] * 40, truth).means()
    for k in CUTOFFS:
        for name, value in (("recall", recall), ("hit", hit_ratio), ("mrr", mrr), ("ndcg", ndcg)):
            assert means[f"{name}@{k}"] == pytest.approx(value[:, k - 1].mean(), abs=EXACT)


def test_clients_add_up_in_any_order():
    rng = np.random.default_rng(2)
    parts = []
    for users in (3, 7, 1, 5):
        scores = torch.from_numpy(rng.standard_normal((users, 40)))
        truth = [rng.integers(40, size=3) for _ in range(users)]
        parts.append(score(scores, [np.array([], int)] * users, truth))
    totals = []
    for order in itertools.permutations(parts):
        total = order[0]
        for part in order[1:]:
            total = total + part
        totals.append(total)
    assert all(total == totals[0] for total in totals)
    assert totals[0].users == 16
    means = totals[0].means()
    for name in ("ndcg@10", "coverage@10"):
        weighted = sum(part.users * part.means()[name] for part in parts) / 16
        assert means[name] == pytest.approx(weighted, abs=1e-15)


def test_a_client_without_users_adds_nothing():
    full = score(torch.tensor([[1.0, 2.0]]), [np.array([], int)], [np.array([0])])
    assert full + Evaluator(2).score() == full


def test_pooled_coverage_is_the_mean_weighted_by_users():
    one = Score(users=1, items=10, sums={}, distinct={"coverage@5": 1 * 5})
    three = Score(users=3, items=10, sums={}, distinct={"coverage@5": 3 * 9})
    assert (one + three).means() == {"coverage@5": (0.5 + 3 * 0.9) / 4}


def test_balance_by_hand():
    assert balance({"b": 3.0, "a": 1.0}) == {
        "mean": 2.0,
        "std": 1.0,
        "cv": 0.5,
        "min": 1.0,
        "worst_decile": 1.0,
        "max_min": 2.0,
        "jain": 0.8,
    }


def test_worst_decile_is_rounded_up():
    assert balance({str(i): float(i) for i in range(10)})["worst_decile"] == 0
    assert balance({str(i): float(i) for i in range(11)})["worst_decile"] == 0.5
    assert balance({str(i): float(i) for i in range(30)})["worst_decile"] == 1


def test_balance_of_zeros_and_of_one_client():
    zeros = balance({"a": 0.0, "b": 0.0})
    assert (zeros["cv"], zeros["jain"], zeros["std"]) == (0, 1, 0)
    alone = balance({"a": 0.1})
    assert (alone["jain"], alone["max_min"], alone["worst_decile"]) == (pytest.approx(1), 0, 0.1)


@given(
    st.lists(st.integers(0, 10**6).map(lambda n: n / 10**6), min_size=1, max_size=40), st.randoms()
)
@settings(max_examples=60, deadline=None)
def test_balance_ignores_order(values, random):
    named = list(enumerate(values))
    shuffled = list(named)
    random.shuffle(shuffled)
    result = balance({str(i): value for i, value in named})
    assert result == balance({str(i): value for i, value in shuffled})
    assert 1 / len(values) - 1e-9 <= result["jain"] <= 1 + 1e-9
