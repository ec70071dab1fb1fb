"""A reduction over Ray tasks: 1, 2 or 4 shards and no shards at all, the same bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fellray.actors.reduction import gram_on_ray, reduce_on_ray
from fellray.platform.aggregation import Mixture, Plan, reduce
from fellray.platform.errors import FellrayError
from fellray.platform.slabs import EXACT, SLAB, gram
from fellray.platform.stack_file import StackFile

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
CLIENTS, PARAMETERS = EXACT + 20, 9 * SLAB + 100


def numbers(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(CLIENTS, PARAMETERS, generator=draw)


def on_disk(path: Path, values: Tensor) -> StackFile:
    stack = StackFile.create(path, *values.shape)
    stack.write(slice(0, CLIENTS), slice(0, PARAMETERS), values)
    return stack


@pytest.mark.long
def test_any_number_of_shards_gives_the_same_bits(local_ray: None, tmp_path: Path) -> None:
    theta, start = numbers(0), numbers(1)
    draw = torch.Generator().manual_seed(2)
    rows = torch.rand(CLIENTS, CLIENTS, generator=draw, dtype=torch.float64)
    rows[7] = torch.eye(CLIENTS)[7]
    plan = Plan(rows / rows.sum(1, keepdim=True))
    begun = on_disk(tmp_path / "start", start)
    products, mixed = gram(theta, start), reduce(plan, theta)
    for shards in (1, 2, 4):
        stack = on_disk(tmp_path / f"theta-{shards}", theta)
        assert torch.equal(gram_on_ray(stack, begun, shards), products), shards
        reduce_on_ray(plan, stack, shards)
        found = stack.read(slice(0, CLIENTS), slice(0, PARAMETERS))
        assert torch.equal(found, mixed), shards
        assert torch.equal(found[7], theta[7]), shards


def test_blocks_are_mixed_by_their_own_matrices(local_ray: None, tmp_path: Path) -> None:
    theta = numbers(0)
    eye = torch.eye(CLIENTS, dtype=torch.float64)
    mean = torch.full_like(eye, 1 / CLIENTS)
    blocks = {"a": slice(0, 700), "b": slice(700, PARAMETERS)}
    plan = Plan(mean, blocks={"a": Mixture(eye.flip(1))})
    stack = on_disk(tmp_path / "theta", theta)
    reduce_on_ray(plan, stack, 2, blocks=blocks)
    found = stack.read(slice(0, CLIENTS), slice(0, PARAMETERS))
    assert torch.equal(found, reduce(plan, theta, blocks))
    assert torch.equal(found[:, :700], theta.flip(0)[:, :700])


def test_what_a_task_says_is_told(local_ray: None, tmp_path: Path) -> None:
    stack = on_disk(tmp_path / "theta", numbers(0))
    with stack.path.open("r+b") as file:
        file.truncate(stack.offset + 50)
    with pytest.raises(FellrayError, match="ends before"):
        gram_on_ray(stack, None, 2)


def test_a_matrix_that_does_not_sum_to_one_is_refused_before_anything_is_written(
    local_ray: None, tmp_path: Path
) -> None:
    stack = on_disk(tmp_path / "theta", numbers(0))
    with pytest.raises(ValueError, match="not to one"):
        reduce_on_ray(Plan(2 * torch.eye(CLIENTS, dtype=torch.float64)), stack, 2)
    assert torch.equal(stack.read(slice(0, CLIENTS), slice(0, PARAMETERS)), numbers(0))
