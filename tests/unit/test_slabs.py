"""Products over column slabs: accurate, symmetric, and the same bits however they are shared."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fellray.platform import slabs
from fellray.platform.slabs import EXACT, SLAB, gram, gram_part, join, mix, unpack
from fellray.platform.stack_file import StackFile

MANY = EXACT + 150
"""Clients whose products are taken in fp32, in more than one tile."""
WIDE = 9 * SLAB + 100


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(num_clients: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(num_clients, num_clients, generator=draw, dtype=torch.float64)
    return rows / rows.sum(1, keepdim=True)


def mixture(mixing: Tensor, theta: Tensor) -> Tensor:
    target = torch.empty_like(theta)
    mix(mixing, theta, target)
    return target


def on_disk(path: Path, values: Tensor) -> StackFile:
    stack = StackFile.create(path, *values.shape)
    stack.write(slice(0, values.shape[0]), slice(0, values.shape[1]), values)
    return stack


def whole(stack: StackFile) -> Tensor:
    return stack.read(slice(0, stack.shape[0]), slice(0, stack.shape[1]))


@pytest.fixture(scope="module")
def theta() -> Tensor:
    return numbers(MANY, WIDE)


@pytest.fixture(scope="module")
def start() -> Tensor:
    return numbers(MANY, WIDE, seed=1)


def test_inner_products_by_hand() -> None:
    theta = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert gram(theta).tolist() == [[5.0, 8.0], [8.0, 16.0]]
    assert gram(theta, torch.tensor([[1.0, 0.0], [1.0, 0.0]])).tolist() == [[4.0, 8.0], [8.0, 17.0]]
    assert gram(torch.empty(3, 0)).tolist() == [[0.0] * 3] * 3
    assert gram(torch.empty(0, 3)).shape == (0, 0)


def test_many_inner_products_against_fp64(theta: Tensor, start: Tensor) -> None:
    """As an error of the cosine of two updates, whose spread here is 1 / sqrt(P) = 5e-3."""
    update = theta.double() - start.double()
    wanted, found = update @ update.T, gram(theta, start)
    norm = wanted.diagonal().sqrt()
    assert found.dtype == torch.float64
    assert float(((found - wanted) / norm[:, None] / norm).abs().max()) < 1e-6


def test_a_small_update_of_many_clients_is_seen_whole() -> None:
    """The difference of neighbours is exact in fp32 too."""
    start = torch.full((MANY, 4), 1000.0)
    assert torch.equal(
        gram(start + 2.0**-12, start), torch.full((MANY, MANY), 4 * 2.0**-24).double()
    )


def test_inner_products_are_symmetric_to_the_bit(theta: Tensor) -> None:
    found = gram(theta)
    assert torch.equal(found, found.T)


def test_few_clients_are_summed_in_fp64() -> None:
    theta, start = numbers(EXACT, 300), numbers(EXACT, 300, seed=1)
    update = theta.double() - start.double()
    torch.testing.assert_close(gram(theta, start), update @ update.T, rtol=0, atol=1e-11)


def test_many_mixtures_against_fp64(theta: Tensor) -> None:
    """Weights around zero, and weights that lie close together far from it."""
    mixing = weights(MANY)
    mixed = mixture(mixing, theta)
    assert float((mixed - mixing @ theta.double()).abs().max()) < 2e-7
    common = numbers(1, WIDE) + 1e-3 * theta
    error = mixture(mixing, common) - mixing @ common.double()
    assert float(error.abs().max() / common.abs().max()) < 1e-6, "a rounding of fp32 is 6e-8"
    assert abs(float(error.mean())) < 1e-9, "rounded weights do not pull towards zero"


@pytest.mark.parametrize("num_clients", [7, MANY])
def test_bits_do_not_depend_on_threads(num_clients: int, theta: Tensor, start: Tensor) -> None:
    theta, start, mixing = theta[:num_clients], start[:num_clients], weights(num_clients)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append((gram(theta, start), mixture(mixing, theta)))
            assert torch.get_num_threads() == threads, "the driver keeps its threads"
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


@pytest.mark.parametrize("num_clients", [7, MANY])
@pytest.mark.parametrize("num_parameters", [100, 3 * SLAB, WIDE])
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_bits_do_not_depend_on_shards(
    shards: int, num_parameters: int, num_clients: int, theta: Tensor, start: Tensor
) -> None:
    """Also where there are fewer slabs than shards."""
    few = (slice(0, num_clients), slice(0, num_parameters))
    theta, start = theta[few], start[few]
    parts = [gram_part(theta, start, s, shards) for s in range(shards)]
    assert torch.equal(unpack(join(parts), num_clients), gram(theta, start))
    mixing, target = weights(num_clients), torch.empty_like(theta)
    for shard in reversed(range(shards)):
        mix(mixing, theta, target, shard, shards)
    assert torch.equal(target, mixture(mixing, theta))


def test_the_order_of_sums_is_one_that_shows(theta: Tensor) -> None:
    """Else the test above would pass for any order. Fp64 sums of fp32 products hardly show it."""
    parts = [gram_part(theta[:7], None, s, 8) for s in range(8)]
    chain = parts[0]
    for part in parts[1:]:
        chain = chain + part
    assert not torch.equal(chain, join(parts))


def test_shards_are_subtrees() -> None:
    with pytest.raises(AssertionError, match="subtrees"):
        gram_part(numbers(2, 3), None, 0, 3)


@pytest.mark.parametrize("num_clients", [7, MANY])
def test_bits_do_not_depend_on_where_the_stack_lies(
    num_clients: int, theta: Tensor, start: Tensor, tmp_path: Path
) -> None:
    """In memory, in memory with everything beside it, or in a file."""
    theta, start, mixing = theta[:num_clients], start[:num_clients], weights(num_clients)
    mixing[3] = torch.eye(num_clients)[3]
    wanted, mixed = gram(theta, start), mixture(mixing, theta)
    assert torch.equal(gram(theta.clone(), start.T.contiguous().T), wanted)
    stack, begun = on_disk(tmp_path / "theta", theta), on_disk(tmp_path / "start", start)
    assert torch.equal(gram(stack, begun), wanted)
    mix(mixing, stack, stack)
    assert torch.equal(whole(stack), mixed)
    assert torch.equal(whole(begun), start)
    inplace = theta.clone()
    mix(mixing, inplace, inplace)
    assert torch.equal(inplace, mixed)


@pytest.mark.parametrize("num_clients", [6, MANY])
def test_equal_rows_and_rows_of_one(num_clients: int, theta: Tensor) -> None:
    """Three kinds of rows, not one behind the other."""
    theta = theta[:num_clients, : SLAB + 7]
    kinds = weights(num_clients)[:2]
    mixing = kinds[torch.arange(num_clients) % 2]
    alone = torch.arange(num_clients) % 3 == 2
    mixing[alone] = torch.eye(num_clients, dtype=torch.float64)[alone]
    mixing[0, 1] += 0.0
    mixed = mixture(mixing, theta)
    assert torch.equal(mixed[alone], theta[alone])
    for kind in (0, 1):
        same = mixed[~alone & (torch.arange(num_clients) % 2 == kind)]
        assert torch.equal(same, same[:1].expand_as(same))
        torch.testing.assert_close(
            same[0].double(), kinds[kind] @ theta.double(), rtol=0, atol=1e-6
        )


def test_a_negative_zero_does_not_make_rows_differ() -> None:
    theta = numbers(MANY, 300)
    mixing = torch.zeros(MANY, MANY, dtype=torch.float64)
    mixing[:, :3] = 1 / 3
    mixing[1::2, 3:] *= -1
    mixed = mixture(mixing, theta)
    assert torch.equal(mixed, mixed[:1].expand_as(mixed))


def test_a_mean_is_computed_once(theta: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    product = torch.mm

    def counted(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        rows.append(len(a))
        return product(a, b, out=out)

    monkeypatch.setattr(slabs.torch, "mm", counted)
    mixture(torch.full((MANY, MANY), 1 / MANY, dtype=torch.float64), theta[:, :SLAB])
    assert rows == [1]


@pytest.mark.parametrize("num_clients", [1, 6, MANY])
def test_the_first_rows_of_a_mixture_alone(num_clients: int, theta: Tensor) -> None:
    theta, mixing = theta[:num_clients], weights(num_clients)
    mixing[0] = torch.eye(num_clients, dtype=torch.float64)[0]
    for rows in {1, min(3, num_clients)}:
        first = theta.new_empty(rows, theta.shape[1])
        mix(mixing, theta, first)
        assert torch.equal(first, mixture(mixing, theta)[:rows])


def test_who_listens_to_nobody_costs_nothing(theta: Tensor, tmp_path: Path) -> None:
    theta = theta[:, :SLAB]
    identity = torch.eye(MANY, dtype=torch.float64)
    assert torch.equal(mixture(identity, theta), theta)
    stack = on_disk(tmp_path / "theta", theta)
    written = stack.path.stat().st_mtime_ns
    mix(identity, stack, stack)
    assert stack.path.stat().st_mtime_ns == written


def test_other_precisions_stay_what_they_are() -> None:
    mixing = weights(MANY)
    for dtype in (torch.float64, torch.bfloat16):
        theta = numbers(MANY, 50).to(dtype)
        mixed = mixture(mixing, theta)
        assert mixed.dtype == dtype
        tolerance = 1e-14 if dtype == torch.float64 else 1e-2
        torch.testing.assert_close(mixed.double(), mixing @ theta.double(), rtol=0, atol=tolerance)


def test_an_error_in_a_worker_is_told(tmp_path: Path) -> None:
    stack = on_disk(tmp_path / "theta", numbers(3, 5))
    stack.path.unlink()
    with pytest.raises(FileNotFoundError):
        gram(stack)
    with pytest.raises(FileNotFoundError):
        mix(weights(3), stack, stack)
