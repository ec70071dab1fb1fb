"""Shrinkage: what a client keeps of itself follows from how far it is from the mean. Ours.

After the positive-part estimator of James and Stein (1961): of several noisy vectors each is drawn
towards their mean, the less the further it stands out of what noise explains.

Shapes: C clients.
"""

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fellray.platform.aggregation import Meta, Method, Plan, Source, centre


def own_weights(gram_CC: Tensor, samples_C: Tensor, noise: float) -> Tensor:
    """``max(0, 1 - s2_c / ||theta_c - mean||^2)`` for each client [C], fp64.

    One round does not tell noise from what makes clients differ, so the noise is a setting: of the
    mean squared distance it is the share `noise`, and a client with more histories has less of it:
    ``s2_c = noise * mean_j ||theta_j - mean||^2 * mean_j(n_j) / n_c``.

    Args:
        gram_CC: inner products of the clients' weights.
        samples_C: n, histories that each read in the round.
        noise: share of the squared distance from the mean that is held for noise.
    """
    distance_C = centre(gram_CC).diagonal().clamp(min=0)
    allowed_C = noise * distance_C.mean() * samples_C.mean() / samples_C
    # at the mean itself there is nothing to keep
    return torch.where(distance_C > 0, 1 - allowed_C / distance_C, 0.0).clamp(min=0)


class Shrinkage(Method):
    """Ours: each client's weights shrunk towards the mean of all, by its distance from it."""

    kind: Literal["shrinkage"] = "shrinkage"
    noise: float = Field(default=0.5, ge=0)
    """Share of the clients' mean squared distance from their mean that is held for noise. 0:
    everybody keeps its own weights; 1: who stands no further out than the average takes the mean;
    larger: nearly all do."""

    def compares(self) -> Collection[Source]:
        """The weights: they are what is shrunk."""
        return ["raw"]

    def reads_losses(self) -> bool:
        """No."""
        return False

    def plan(self, meta: Meta) -> Plan:
        """A share of oneself, the rest the mean."""
        own_C = own_weights(meta.gram["raw"], meta.samples_C, self.noise)
        num_clients = len(own_C)
        mean_CC = torch.full_like(meta.gram["raw"], 1 / max(1, num_clients))
        return Plan(own_C.diag() + (1 - own_C)[:, None] * mean_CC, {"shrunk_by": 1 - own_C})
