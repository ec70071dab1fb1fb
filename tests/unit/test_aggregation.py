"""The law of aggregation: one snapshot, rows that sum to one, no order of arrival."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fellray.platform.aggregation import (
    Method,
    Mixture,
    Plan,
    cosine,
    describe,
    reduce,
    reduce_,
    split_columns,
)
from fellray.platform.fellrec import Fellrec
from fellray.platform.methods import FedAvg
from fellray.platform.slabs import EXACT, SLAB

METHODS: list[Method] = [
    FedAvg(),
    FedAvg(weighting="samples"),
    Fellrec(),
    Fellrec(similarity="raw"),
    Fellrec(attention="softmax"),
    Fellrec(attention="top_k", k=2),
    Fellrec(standardise_losses=True),
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_describe_by_hand() -> None:
    theta = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    start = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    meta = describe(3, ["a", "b"], [0.5, 1.5], [7, 9], theta, start)
    assert (meta.round, meta.clients) == (3, ("a", "b"))
    assert meta.losses_C.tolist() == [0.5, 1.5]
    assert meta.samples_C.tolist() == [7.0, 9.0]
    assert meta.gram["raw"].tolist() == [[5.0, 8.0], [8.0, 16.0]]
    assert meta.gram["update"].tolist() == [[4.0, 8.0], [8.0, 17.0]]
    assert all(gram.dtype == torch.float64 for gram in meta.gram.values())


def test_only_what_is_compared_is_computed() -> None:
    theta, start = numbers(2, 3), numbers(2, 3, seed=1)
    both = describe(1, ["a", "b"], [0, 0], [1, 1], theta, start)
    assert sorted(both.gram) == ["raw", "update"]
    for source in ("raw", "update"):
        one = describe(1, ["a", "b"], [0, 0], [1, 1], theta, start, [source])
        assert list(one.gram) == [source]
        assert torch.equal(one.gram[source], both.gram[source])
    assert describe(1, ["a", "b"], [0, 0], [1, 1], theta, start, []).gram == {}


def test_describe_wants_sorted_clients() -> None:
    with pytest.raises(AssertionError, match="sorted"):
        describe(1, ["b", "a"], [0, 0], [1, 1], numbers(2, 3), numbers(2, 3))


def test_an_update_far_smaller_than_the_weights_is_seen_whole() -> None:
    """Inner products are taken in fp64: the difference, not the rounded difference of products."""
    start = torch.full((1, 4), 1000.0)
    theta = start + 2.0**-12
    meta = describe(1, ["a"], [0.0], [1], theta, start)
    assert meta.gram["update"].item() == 4 * 2.0**-24


def test_reduce_by_hand() -> None:
    mixing = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    theta = torch.tensor([[2.0, 4.0], [6.0, 0.0]])
    mixed = reduce(Plan(mixing), theta)
    assert mixed.tolist() == [[4.0, 2.0], [5.0, 1.0]]
    assert mixed.dtype == torch.float32
    assert theta.tolist() == [[2.0, 4.0], [6.0, 0.0]], "the snapshot is read, not written"


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("num_clients", [5, 140])
def test_in_place_it_is_the_same(method: Method, num_clients: int) -> None:
    """Fp64 and fp32, and nothing is left of the snapshot."""
    theta, start = numbers(num_clients, 300), numbers(num_clients, 300, seed=1)
    names = [f"c{i:03d}" for i in range(num_clients)]
    ones = [1] * num_clients
    meta = describe(1, names, ones, ones, theta, start, method.compares())
    plan = method.plan(meta)
    mixed = reduce(plan, theta)
    assert not torch.equal(mixed, theta)
    reduce_(plan, theta)
    assert torch.equal(theta, mixed)


def test_in_place_a_bad_matrix_changes_nothing() -> None:
    theta = numbers(2, 3)
    with pytest.raises(ValueError, match=r"row 1 of the mixing matrix sums to 2\.0, not to one"):
        reduce_(Plan(torch.tensor([[0.5, 0.5], [1.0, 1.0]], dtype=torch.float64)), theta)
    assert torch.equal(theta, numbers(2, 3))


def test_reduce_sums_in_fp64() -> None:
    theta = torch.tensor([[1.0], [2.0**-30], [-1.0]])
    mixing = torch.full((3, 3), 1 / 4, dtype=torch.float64).fill_diagonal_(1 / 2)
    wanted = mixing @ theta.double()
    assert torch.equal(reduce(Plan(mixing), theta), wanted.float())
    assert reduce(Plan(mixing), theta)[1].item() == 2.0**-31


@pytest.mark.parametrize("row", [[0.5, 0.4], [0.6, 0.6], [float("nan"), 1.0]])
def test_rows_that_do_not_sum_to_one_are_refused(row: list[float]) -> None:
    mixing = torch.tensor([row, [0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="not to one"):
        reduce(Plan(mixing), numbers(2, 3))


@given(
    arrays(
        np.float32,
        (3, 5),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    )
)
def test_who_listens_to_nobody_keeps_its_bits(theta: np.ndarray) -> None:
    mixed = reduce(Plan(torch.eye(3, dtype=torch.float64)), torch.from_numpy(theta))
    assert mixed.numpy().tobytes() == theta.tobytes()


@pytest.mark.parametrize("num_clients", [2, 5, 6, 13])
def test_who_listens_to_the_same_receives_the_same(num_clients: int) -> None:
    """FedAvg: everybody receives one mean, bit for bit, whatever its place in the matrix."""
    row = torch.full((num_clients, num_clients), 1 / num_clients, dtype=torch.float64)
    for seed in range(20):
        theta = numbers(1, 300, seed=seed) + 1e-3 * numbers(num_clients, 300, seed=seed + 100)
        mixed = reduce(Plan(row), theta)
        assert torch.equal(mixed, mixed[:1].expand_as(mixed)), seed
        common = reduce(Plan(row, common=True), theta)
        assert torch.equal(common, mixed), seed
        assert common.stride(0) == 0, "one row in memory"


@pytest.mark.parametrize("num_clients", [5, 17, 40])
def test_bits_do_not_depend_on_the_drivers_threads(num_clients: int) -> None:
    """The driver's thread count is nobody's setting; a resumed run may meet another machine."""
    theta, start = numbers(num_clients, 5000), numbers(num_clients, 5000, seed=1)
    names = [f"c{i:02d}" for i in range(num_clients)]
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        meta = describe(1, names, [1.0] * num_clients, [1] * num_clients, theta, start)
        plan = Fellrec().plan(meta)
        found.append((*meta.gram.values(), plan.mixing_CC, reduce(plan, theta)))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


def test_nobody_and_nothing() -> None:
    nobody = torch.zeros(0, 0, dtype=torch.float64)
    for common in (False, True):
        assert reduce(Plan(nobody, common=common), torch.empty(0, 4)).shape == (0, 4)
    assert reduce(Plan(torch.eye(2, dtype=torch.float64)), torch.empty(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_clients_may_be_renamed(method: Method) -> None:
    """A permutation of the clients permutes the plan and the mixture, and does nothing else."""
    theta, start, order = numbers(5, 40), numbers(5, 40, seed=1), [3, 0, 4, 1, 2]
    losses, samples = [2.0, 2.1, 1.9, 2.4, 2.05], [10, 20, 30, 40, 50]
    names = ["a", "b", "c", "d", "e"]
    one = method.plan(describe(3, names, losses, samples, theta, start))
    other = method.plan(
        describe(
            3,
            names,
            [losses[i] for i in order],
            [samples[i] for i in order],
            theta[order],
            start[order],
        )
    )
    torch.testing.assert_close(other.mixing_CC, one.mixing_CC[order][:, order], rtol=0, atol=1e-13)
    torch.testing.assert_close(
        reduce(other, theta[order]), reduce(one, theta)[order], rtol=0, atol=1e-6
    )
    assert not torch.allclose(one.mixing_CC[0], other.mixing_CC[0], atol=1e-4) or isinstance(
        method, FedAvg
    ), "the permutation was one that shows"


def test_cosine_by_hand() -> None:
    vectors = torch.tensor([[3.0, 4.0], [4.0, -3.0], [6.0, 8.0], [0.0, 0.0]], dtype=torch.float64)
    assert cosine(vectors @ vectors.T).tolist() == [
        [1.0, 0.0, 1.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ]


@given(arrays(np.float64, (4, 3), elements=st.floats(-1e6, 1e6)), st.floats(1e-3, 1e3))
def test_cosine_stays_in_bounds_and_ignores_length(vectors: np.ndarray, scale: float) -> None:
    rows = torch.from_numpy(vectors)
    similarity = cosine(rows @ rows.T)
    assert float(similarity.abs().max()) <= 1.0
    assert torch.equal(similarity.diagonal(), torch.ones(4, dtype=torch.float64))
    norms = rows.norm(dim=1)
    if float(norms.min()) > 1e-3:
        stretched = rows * scale
        torch.testing.assert_close(cosine(stretched @ stretched.T), similarity, rtol=0, atol=1e-9)


def test_own_weight_is_the_diagonal() -> None:
    plan = Plan(torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64))
    assert plan.own_weight_C.tolist() == [0.9, 0.7]


# --- blocks ---------------------------------------------------------------------------------------


def test_each_block_is_mixed_by_its_own_matrix() -> None:
    """By hand: a mean, the client's own, and the plan's for the block without one."""
    theta = torch.tensor([[2.0, 4.0, 8.0], [6.0, 0.0, 2.0]])
    blocks = {"a": slice(0, 1), "b": slice(1, 2), "c": slice(2, 3)}
    half, eye = torch.full((2, 2), 0.5, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    rest = torch.tensor([[0.75, 0.25], [0.0, 1.0]], dtype=torch.float64)
    plan = Plan(rest, blocks={"a": Mixture(half, common=True), "b": Mixture(eye)})
    assert reduce(plan, theta, blocks).tolist() == [[4.0, 4.0, 6.5], [4.0, 0.0, 2.0]]
    reduce_(plan, theta, blocks)
    assert theta.tolist() == [[4.0, 4.0, 6.5], [4.0, 0.0, 2.0]]


@pytest.mark.parametrize("num_clients", [3, EXACT + 2])
def test_neighbours_with_one_matrix_are_mixed_at_once_and_blocks_change_no_bit(
    num_clients: int,
) -> None:
    width = SLAB + 90
    theta = numbers(num_clients, width)
    rows = torch.rand(num_clients, num_clients, dtype=torch.float64) + 0.1
    rows /= rows.sum(1, keepdim=True)
    other = rows.flip(1)
    blocks = {"a": slice(0, 5), "b": slice(5, SLAB), "c": slice(SLAB, width)}
    whole = Plan(rows, blocks=dict.fromkeys(blocks, Mixture(rows)))
    assert [columns for _, columns in split_columns(whole, blocks, width)] == [slice(0, width)]
    assert torch.equal(reduce(whole, theta, blocks), reduce(Plan(rows), theta))
    part = Plan(rows, blocks={"c": Mixture(other)})
    mixed = reduce(part, theta, blocks)
    assert torch.equal(mixed[:, :SLAB], reduce(Plan(rows), theta[:, :SLAB].contiguous()))
    assert torch.equal(mixed[:, SLAB:], reduce(Plan(other), theta[:, SLAB:].contiguous()))


def test_one_row_for_all_where_every_block_is_common() -> None:
    row = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    first = torch.eye(3, dtype=torch.float64)[[0, 0, 0]]
    blocks = {"a": slice(0, 2), "b": slice(2, 4)}
    plan = Plan(row, common=True, blocks={"b": Mixture(first, common=True)})
    mixed = reduce(plan, numbers(3, 4), blocks)
    assert mixed.stride(0) == 0
    assert torch.equal(mixed[2, 2:], numbers(3, 4)[0, 2:])


def test_a_block_that_is_not_sent_or_does_not_sum_to_one_is_refused() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="mixes block 'gate', which is not sent"):
        reduce(Plan(eye, blocks={"gate": Mixture(eye)}), numbers(2, 3), {"a": slice(0, 3)})
    theta = numbers(2, 3)
    with pytest.raises(ValueError, match="not to one"):
        reduce_(Plan(eye, blocks={"a": Mixture(2 * eye)}), theta, {"a": slice(0, 3)})
    assert torch.equal(theta, numbers(2, 3))
