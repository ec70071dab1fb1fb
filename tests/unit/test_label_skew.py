"""Dirichlet label skew over users."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fellray.platform import label_skew
from fellray.platform.errors import FellrayError
from fellray.platform.label_skew import deal_users, label_users


def labels(met: list[list[int]], categories: list[str]) -> list[int]:
    user = np.repeat(np.arange(len(met)), [len(one) for one in met])
    item = np.array([i for one in met for i in one], np.int64)
    got: list[int] = label_users(user, item, pa.chunked_array([categories])).tolist()
    return got


def test_a_user_has_the_category_met_most_in_equal_parts_of_one() -> None:
    # Comedy 0, Drama 1, War 2, nothing 3
    films = ["Drama|War", "War", "Comedy", "", "Comedy|Drama|War"]
    assert labels([[0, 1], [0, 2], [3], [0], [2, 4, 4, 4], [3, 2]], films) == [2, 0, 3, 1, 0, 0]


def test_equal_sums_are_equal_in_spite_of_rounding() -> None:
    """Ten tenths of B to K, and a whole Z: B comes first, though ten tenths add up to less."""
    assert labels([[0] * 10 + [1]], ["B|C|D|E|F|G|H|I|J|K", "Z"]) == [0]


def test_a_category_of_nearly_all_items_tells_nothing() -> None:
    shop = ["Games|PC", "Games|PC", "Games|Switch", "Games"]
    assert labels([[0, 1, 2], [2], [3]], shop) == [1, 2, 3]
    assert labels([[0], [1]], ["Games", "Games"]) == [0, 0]


def test_blocks_of_users_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(50, size=400), rng.integers(30, size=400)
    films = pa.chunked_array([["|".join(rng.choice(list("ABCD"), 2)) for _ in range(30)]])
    whole = label_users(user, item, films)
    monkeypatch.setattr(label_skew, "_CELLS", 12)
    assert label_users(user, item, films).tolist() == whole.tolist()


def test_without_categories_there_are_no_labels() -> None:
    with pytest.raises(FellrayError, match=r"needs categories.*data\.columns\.categories=<column>"):
        labels([[0]], ["", "|"])


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda c: sum(c) >= 7),
    clients=st.integers(1, 7),
    alpha=st.sampled_from([1e-6, 0.01, 0.5, 10, 1e6]),
    seed=st.integers(0, 5),
)
def test_everybody_is_dealt_once_in_equal_sizes(
    counts: list[int], clients: int, alpha: float, seed: int
) -> None:
    label_U = np.repeat(np.arange(len(counts)) * 3, counts)
    dealt = deal_users(label_U, clients, alpha, 1, seed)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(label_U)))
    sizes = [len(one) for one in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert all((np.diff(one) > 0).all() for one in dealt)
    again = deal_users(label_U, clients, alpha, 1, seed)
    assert [one.tolist() for one in again] == [one.tolist() for one in dealt]


def test_alpha_goes_from_one_label_per_client_to_everybodys_mix() -> None:
    label_U = np.repeat([0, 1, 2, 3], 500)

    def largest_share(alpha: float) -> float:
        dealt = deal_users(label_U, 10, alpha, 1, 0)
        return float(np.mean([np.bincount(label_U[one]).max() / len(one) for one in dealt]))

    assert largest_share(1e6) < 0.32
    assert 0.35 < largest_share(1.0) < 0.85
    assert largest_share(1e-3) > 0.8  # the last clients take what is left


def test_the_draw_follows_the_prior() -> None:
    """Over many seeds a client's mix is the population's on average (Dirichlet's mean is p)."""
    label_U = np.repeat([0, 1], [900, 100])
    share = [(label_U[deal_users(label_U, 50, 1.0, 1, s)[0]] == 1).mean() for s in range(300)]
    assert abs(float(np.mean(share)) - 0.1) < 0.05


def test_other_seeds_and_clients_too_small() -> None:
    label_U = np.arange(40) % 4
    assert [a.tolist() for a in deal_users(label_U, 4, 1.0, 1, 0)] != [
        a.tolist() for a in deal_users(label_U, 4, 1.0, 1, 1)
    ]
    with pytest.raises(FellrayError, match=r"num_clients=9: 40 users are 4 .*min_users is 5"):
        deal_users(label_U, 9, 1.0, 5, 0)
