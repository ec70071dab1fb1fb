"""The one law of aggregation: a method plans a mixing matrix, `reduce` applies it.

A round ends, for each sent block, with ``theta[r] <- sum_c M[r, c] * theta[c]``, rows of M summing
to one. A method is its `plan`: a pure function of what is known about the round. Nothing here knows
where a client runs, or in which order clients answered: they are sorted by id before they get here.
How products of large stacks are taken is `slabs`' business.

Shapes: C clients, P parameters of one client, R rows of a mixture that differ.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fellray.platform.slabs import Stack, gram, mix

Source = Literal["update", "raw"]
"""What the similarity of two clients is computed from."""


@dataclass(frozen=True)
class Meta:
    """What a method may look at: facts and inner products, never one client's tensors."""

    round: int
    """t = 1, 2, ..."""
    clients: tuple[str, ...]
    """Those whose round was accepted, sorted."""
    losses_C: Tensor
    """Mean local training loss of the round, fp64."""
    samples_C: Tensor
    """Training histories read in the round, fp64."""
    gram: Mapping[Source, Tensor]
    """Inner products [C, C], fp64: of the updates (`update`), of the sent weights (`raw`); those
    that the method compares."""


@dataclass(frozen=True)
class Reports:
    """What all learners sent at the end of a round."""

    meta: Meta
    """Of those whose round was accepted."""
    theta_CP: Tensor
    """Their sent weights, rows in the order of `meta.clients`; no columns where nothing is shared.
    """
    refused: Mapping[str, str]
    """Learners that keep the state of the round's start, and why."""
    losses: Mapping[str, float]
    """Every learner's mean training loss; those of refused learners may not be finite."""
    samples: int
    seconds: float
    """Wall time of local training."""
    late: tuple[str, ...] = ()
    """Asked, but not counted: their answers came after the deadline, or after enough others."""


@dataclass(frozen=True)
class Plan:
    """Who listens to whom."""

    mixing_CC: Tensor
    """Row r: what recipient r takes of each client; rows sum to one. fp64."""
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    """Per client [C], for the record only (a learning degree, say)."""
    common: bool = False
    """All rows are equal and meant for everyone: also those who did not take part start their next
    round from it. Otherwise they keep what they have."""

    @property
    def own_weight_C(self) -> Tensor:
        """What each client keeps of itself."""
        return self.mixing_CC.diagonal()


class Method(BaseModel):
    """A federated method: its settings, which clients train together, and its plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def seat(self, clients: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Whose data trains under which adapters: learner -> the clients whose shards it reads.

        A federated method gives every client a seat of its own.
        """
        return {client: (client,) for client in clients}

    def compares(self) -> Collection[Source]:
        """The inner products that `plan` looks at; each costs about half of what mixing costs."""
        return ("update", "raw")

    def reads_losses(self) -> bool:
        """Whether `plan` looks at the losses. Where clients do not send them, they are NaN."""
        return True

    def plan(self, meta: Meta) -> Plan:
        """The mixing matrix of this round."""
        raise NotImplementedError


def describe(
    round: int,
    clients: Sequence[str],
    losses: Sequence[float],
    samples: Sequence[int],
    theta_CP: Stack,
    start_CP: Stack,
    sources: Collection[Source] = ("update", "raw"),
) -> Meta:
    """What a plan may look at, from one snapshot of everybody's sent weights.

    Args:
        round: t = 1, 2, ...
        clients: sorted ids, one per row.
        losses: each client's mean local training loss.
        samples: how many histories each client read.
        theta_CP: sent weights after local training.
        start_CP: the same weights at the start of the round.
        sources: what inner products are taken of: what the method compares.
    """
    assert list(clients) == sorted(clients), "rows follow the sorted client ids"
    return Meta(
        round=round,
        clients=tuple(clients),
        losses_C=torch.tensor(losses, dtype=torch.float64),
        samples_C=torch.tensor(samples, dtype=torch.float64),
        gram={s: gram(theta_CP, start_CP if s == "update" else None) for s in sources},
    )


def reduce(plan: Plan, theta_CP: Tensor) -> Tensor:
    """``M @ theta`` [C, P] in theta's dtype, from one snapshot that is left as it is.

    Equal rows of the matrix give equal bits, and a row that listens to nobody else returns its own
    weights bit for bit. Sums are taken in fp64 for up to `slabs.EXACT` clients, in fp32 for more.
    Where the plan has one row for everyone the rows are one in memory, and not to be written to.

    Raises:
        ValueError: a row of the matrix does not sum to one.
    """
    check_rows(plan)
    num_clients, num_parameters = theta_CP.shape
    differ = min(1, num_clients) if plan.common else num_clients
    mixed_RP = theta_CP.new_empty(differ, num_parameters)
    mix(plan.mixing_CC, theta_CP, mixed_RP)
    return mixed_RP.expand(num_clients, num_parameters)


def reduce_(plan: Plan, theta_CP: Stack) -> None:
    """`reduce`, the same bits, into the snapshot's own place: a few slabs of memory more.

    When it is interrupted the stack is part snapshot, part mixture, and has to be made again.

    Raises:
        ValueError: a row of the matrix does not sum to one; nothing was written.
    """
    check_rows(plan)
    mix(plan.mixing_CC, theta_CP, theta_CP)


def check_rows(plan: Plan) -> None:
    """See that the weights of every recipient sum to one, in fp64 and before they are rounded.

    Raises:
        ValueError: a row does not.
    """
    sum_C = plan.mixing_CC.double().sum(1)
    off_C = ~((sum_C - 1).abs() <= 1e-6)
    if off_C.any():
        first = int(off_C.nonzero()[0])
        raise ValueError(
            f"row {first} of the mixing matrix sums to {sum_C[first].item()}, not to one; "
            f"{int(off_C.sum())} of {len(sum_C)} rows are off"
        )


def cosine(gram_CC: Tensor) -> Tensor:
    """Cosine similarities [C, C] from inner products; 0 with a zero vector, 1 on the diagonal."""
    norm_C = gram_CC.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norm_C > 0, 1 / norm_C, torch.zeros_like(norm_C))
    similarity = gram_CC * scale[:, None]
    similarity *= scale[None, :]
    return similarity.clamp_(-1, 1).fill_diagonal_(1.0)
