"""A reduction dealt to Ray tasks: each takes a share of the columns of stacks that lie in files.

For federations whose stack fits into no memory. Every node must reach the files by the same path.
The shares are subtrees of one fixed tree, so 1, 2, 4 or 8 shards give the same bits, and the same
as one process. What is summed, and how, is `platform/slabs.py`'s business.

Shapes: C clients, P parameters of one client.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fellray.actors.session import ray
from fellray.platform.aggregation import NO_BLOCKS, Plan, split_columns
from fellray.platform.errors import FellrayError
from fellray.platform.slabs import gram_part, join, mix, unpack
from fellray.platform.stack_file import StackFile


def gram_on_ray(
    theta: StackFile, start: StackFile | None, shards: int, cpus: float = 1.0
) -> Tensor:
    """`slabs.gram` by Ray tasks: inner products [C, C] of ``theta - start``, or of theta.

    Args:
        theta: sent weights [C, P].
        start: what is taken off them.
        shards: 1, 2, 4 or 8 tasks.
        cpus: cores of a task; it uses as many threads.

    Raises:
        FellrayError: a task was lost more often than Ray tries again.
    """
    tasks = [(theta, start, shard, shards) for shard in range(shards)]
    parts = _run(
        _sum, tasks, cpus, tries=3, lost=f"{theta.path}: the inner products were not taken"
    )
    # Ray's arrays are read-only, and a tensor cannot be
    return unpack(join([torch.from_numpy(part.copy()) for part in parts]), theta.shape[0])


def reduce_on_ray(
    plan: Plan,
    theta: StackFile,
    shards: int,
    cpus: float = 1.0,
    blocks: Mapping[str, slice] = NO_BLOCKS,
) -> None:
    """`aggregation.reduce_` by Ray tasks, in the stack's place.

    Args:
        plan: who listens to whom.
        theta: sent weights [C, P]; the mixtures afterwards.
        shards: 1, 2, 4 or 8 tasks.
        cpus: cores of a task; it uses as many threads.
        blocks: as `aggregation.reduce`.

    Raises:
        ValueError: as `aggregation.split_columns`; nothing was written.
        FellrayError: a task was lost. It is not run again, because columns that it had mixed would
            be mixed twice: the stack has to be made again.
    """
    parts = split_columns(plan, blocks, theta.shape[1])
    matrices = {id(part.mixing_CC): part.mixing_CC for part, _ in parts}
    held = {key: ray.put(mixing_CC.numpy()) for key, mixing_CC in matrices.items()}
    # references in a list are not fetched for the task: it has the list, and asks for one at a time
    mixed = [(held[id(part.mixing_CC)], columns) for part, columns in parts]
    tasks = [(mixed, theta, shard, shards) for shard in range(shards)]
    _run(_mix, tasks, cpus, tries=0, lost=f"{theta.path}: is mixed in part only; make it again")


def _run(
    work: Callable[..., Any], tasks: list[tuple[Any, ...]], cpus: float, tries: int, lost: str
) -> list[Any]:
    remote = ray.remote(work).options(num_cpus=cpus, max_retries=tries)
    running = [remote.remote(*task) for task in tasks]
    try:
        return list(ray.get(running))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FellrayError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise FellrayError(f"{lost}: a task was lost: {error}") from None


def _sum(theta: StackFile, start: StackFile | None, shard: int, shards: int) -> np.ndarray:
    return gram_part(theta, start, shard, shards).numpy()


def _mix(parts: Sequence[tuple[Any, slice]], theta: StackFile, shard: int, shards: int) -> None:
    for reference, columns in parts:
        mixing_CC = torch.from_numpy(ray.get(reference).copy())
        mix(mixing_CC, theta, theta, shard, shards, columns)
