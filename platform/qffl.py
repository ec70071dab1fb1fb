"""q-FFL: clients with a larger loss count more, so that losses come closer to each other.

Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020 (arXiv 1905.10497),
algorithm 2 (q-FedAvg).

Shapes: C clients.
"""

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fellray.platform.aggregation import Meta, Method, Plan, Source
from fellray.platform.server_step import Partway

LEAST = 1e-10
"""A loss of zero has no power below zero."""


def fair_weights(losses_C: Tensor, square_C: Tensor, q: float, lipschitz: float) -> Tensor:
    """What each client's update counts [C], fp64; the sum is at most one, with q = 0 exactly.

    The paper's step is ``w - sum_k D_k / sum_k h_k`` with ``D_k = F_k^q L (w - w_k)`` and
    ``h_k = q F_k^(q-1) ||L (w - w_k)||^2 + L F_k^q``. So client k's update ``w_k - w`` counts
    ``F_k^q / sum_j (q F_j^(q-1) L ||w_j - w||^2 + F_j^q)``.

    Args:
        losses_C: F.
        square_C: squared norms of the updates.
        q: how much more a larger loss counts.
        lipschitz: L.
    """
    losses = losses_C.double().clamp(min=LEAST)
    raised = losses.pow(q)
    steep = q * losses.pow(q - 1) * lipschitz * square_C.double().clamp(min=0)
    return raised / (steep + raised).sum()


class QFfl(Method):
    """Li et al. 2020, q-FedAvg: an update counts by its client's loss to the power of q.

    F is the mean training loss over the round, where the paper has the loss at its start.
    """

    kind: Literal["qffl"] = "qffl"
    q: float = Field(default=1.0, ge=0)
    """0: the plain mean; larger: the worst client counts more."""
    lipschitz: float = Field(default=1.0, gt=0)
    """L, which bounds how fast the gradient changes: larger takes shorter steps. The authors take
    one over the learning rate of their clients' plain SGD. Clients here train with AdamW, whose
    step does not shrink with the gradient, so that there is no such rule; tune it."""

    def compares(self) -> Collection[Source]:
        """Only the updates' norms are looked at."""
        return ["update"]

    def plan(self, meta: Meta) -> Plan:
        """The weights as one row that sums to one, and how far the server goes towards that mean:
        what the weights sum to."""
        num_clients = len(meta.clients)
        if not num_clients:
            return Plan(torch.empty(0, 0, dtype=torch.float64), common=True)
        weight_C = fair_weights(
            meta.losses_C, meta.gram["update"].diagonal(), self.q, self.lipschitz
        )
        row_C = weight_C / weight_C.sum()
        step = Partway(float(weight_C.sum()))
        return Plan(row_C.repeat(num_clients, 1), {"update_weight": weight_C}, True, step=step)
