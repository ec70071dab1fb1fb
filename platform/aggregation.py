"""The one law of aggregation: a method plans a mixing matrix, `reduce` applies it.

A round ends, for each sent block, with ``theta[r] <- sum_c M[r, c] * theta[c]``, rows of M summing
to one. A method is its `plan`: a pure function of what is known about the round. Nothing here knows
where a client runs, or in which order clients answered: they are sorted by id before they get here.

Shapes: C clients, P parameters of one client.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fellray.platform.threads import one_thread

Source = str
"""What the similarity of two clients is computed from: `update` or `raw`."""


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
    """Inner products [C, C], fp64: of the updates (`update`), of the sent weights (`raw`)."""


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

    def plan(self, meta: Meta) -> Plan:
        """The mixing matrix of this round."""
        raise NotImplementedError


def describe(
    round: int,
    clients: Sequence[str],
    losses: Sequence[float],
    samples: Sequence[int],
    theta_CP: Tensor,
    start_CP: Tensor,
) -> Meta:
    """What a plan may look at, from one snapshot of everybody's sent weights.

    Args:
        round: t = 1, 2, ...
        clients: sorted ids, one per row.
        losses: each client's mean local training loss.
        samples: how many histories each client read.
        theta_CP: sent weights after local training.
        start_CP: the same weights at the start of the round.
    """
    assert list(clients) == sorted(clients), "rows follow the sorted client ids"
    theta, update = theta_CP.double(), theta_CP.double() - start_CP.double()
    with one_thread():
        gram = {"update": update @ update.T, "raw": theta @ theta.T}
    return Meta(
        round=round,
        clients=tuple(clients),
        losses_C=torch.tensor(losses, dtype=torch.float64),
        samples_C=torch.tensor(samples, dtype=torch.float64),
        gram=gram,
    )


def reduce(plan: Plan, theta_CP: Tensor) -> Tensor:
    """``M @ theta`` [C, P] in theta's dtype, summed in fp64 from one snapshot.

    A row that listens to nobody else returns its own weights bit for bit.

    Raises:
        ValueError: a row of the matrix does not sum to one.
    """
    mixing = plan.mixing_CC
    if not torch.allclose(mixing.sum(1), torch.ones(len(mixing), dtype=mixing.dtype), atol=1e-9):
        raise ValueError(f"rows of the mixing matrix sum to {mixing.sum(1).tolist()}, not to one")
    theta = theta_CP.to(mixing.dtype)
    mixed = torch.zeros_like(theta)
    # Client by client, not as a matrix product, whose order of summation depends on a row's place
    # and on the number of threads.
    for weights_C, row_P in zip(mixing.T, theta, strict=True):
        mixed += weights_C[:, None] * row_P
    alone = (mixing == torch.eye(len(mixing), dtype=mixing.dtype)).all(1)
    return torch.where(alone[:, None], theta_CP, mixed.to(theta_CP.dtype))


def cosine(gram_CC: Tensor) -> Tensor:
    """Cosine similarities [C, C] from inner products; 0 with a zero vector, 1 on the diagonal."""
    norm_C = gram_CC.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norm_C > 0, 1 / norm_C, torch.zeros_like(norm_C))
    similarity = (gram_CC * scale[:, None] * scale[None, :]).clamp(-1, 1)
    return similarity.fill_diagonal_(1.0)
