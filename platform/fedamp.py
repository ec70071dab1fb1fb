"""FedAMP: everybody is drawn to a cloud model of its own, made of clients that are like it.

Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data", AAAI 2021
(arXiv 2007.03797).

Shapes: C clients.
"""

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fellray.platform.aggregation import Meta, Method, Plan, Source
from fellray.platform.errors import FellrayError
from fellray.platform.local import LocalRule


def squared_distances(gram_CC: Tensor) -> Tensor:
    """||theta_i - theta_j||^2 [C, C] from inner products."""
    norm_C = gram_CC.diagonal()
    distance_CC = (norm_C[:, None] + norm_C[None, :] - 2 * gram_CC).clamp_(min=0)
    return distance_CC.fill_diagonal_(0.0)


def attention(distance_CC: Tensor, alpha: float, sigma: float) -> Tensor:
    """xi [C, C]: xi_ij = alpha A'(||theta_i - theta_j||^2) for others, and the rest for oneself
    (the paper's equation 6), where A(x) = 1 - exp(-x / sigma), so A'(x) = exp(-x / sigma) / sigma.
    """
    xi_CC = torch.exp(-distance_CC / sigma) * (alpha / sigma)
    xi_CC.fill_diagonal_(0.0)
    return xi_CC + torch.diag(1 - xi_CC.sum(1))


class FedAmp(Method):
    """The server gives each client the cloud model u_c = sum_j xi_cj theta_j; the client trains its
    own theta_c, from where it left it, on F_c(theta) + pull/2 ||theta - u_c||^2. Evaluated and
    served is theta_c.
    """

    kind: Literal["fedamp"] = "fedamp"
    sigma: float = Field(default=1.0, gt=0)
    """At which squared distance of two clients' adapters attention has fallen to 1/e."""
    alpha: float | None = Field(default=None, gt=0)
    """The paper's step alpha_k: a client at distance 0 has the weight alpha / sigma. None: sigma
    divided by the clients that took part, the most that leaves nobody a negative weight at any
    distances."""
    pull: float = Field(default=0.1, ge=0)
    """Strength of the pull to the cloud model: the paper's lambda / alpha_k."""

    def compares(self) -> Collection[Source]:
        """The weights themselves: clients start from weights of their own."""
        return ["raw"]

    def reads_losses(self) -> bool:
        """No."""
        return False

    def local(self) -> LocalRule:
        """Pulled to the cloud model, which stays beside the client's own weights."""
        return LocalRule(pull=self.pull, anchored=True)

    def plan(self, meta: Meta) -> Plan:
        """The attention matrix.

        Raises:
            FellrayError: somebody would have a negative weight of its own.
        """
        alpha = self.sigma / max(1, len(meta.clients)) if self.alpha is None else self.alpha
        xi_CC = attention(squared_distances(meta.gram["raw"]), alpha, self.sigma)
        own_C = xi_CC.diagonal()
        if len(own_C) and float(own_C.min()) < 0:
            worst = meta.clients[int(own_C.argmin())]
            raise FellrayError(
                f"method.alpha={alpha:g}: client {worst} would take {float(own_C.min()):.3g} of "
                f"itself, which is no mean of clients; set method.alpha to "
                f"{self.sigma / len(own_C):g} or less (sigma / clients), or leave it out"
            )
        return Plan(xi_CC)
