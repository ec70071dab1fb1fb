"""FedOpt: the server takes an adaptive step along the mean of the clients' updates.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), algorithm 2.

Shapes: R rows (one: all clients have one state), P parameters of one client.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fellray.platform.aggregation import Meta, Plan
from fellray.platform.averaging import Averaging
from fellray.platform.server_step import Snapshot, State

Kind = Literal["fedadam", "fedyogi", "fedadagrad"]


@dataclass(frozen=True)
class Adaptive:
    """One step of algorithm 2, lines 12 to 16; without bias correction, as there.

    With the pseudo-gradient D = mixture - start::

        m <- beta1 m + (1 - beta1) D
        v <- v + D^2                            (fedadagrad)
        v <- v - (1 - beta2) D^2 sign(v - D^2)  (fedyogi)
        v <- beta2 v + (1 - beta2) D^2          (fedadam)
        theta <- start + server_learning_rate m / (sqrt(v) + tau)

    Before the first step m is 0 and v is tau^2, the smallest that the paper allows.
    """

    kind: Kind
    server_learning_rate: float
    beta1: float
    beta2: float
    tau: float

    def take(self, seen: Snapshot, state: State) -> tuple[Tensor, State]:
        """See `ServerStep`; in fp64. State: `m` and `v` [R, P]."""
        start = seen.start_RP.double()
        gradient = seen.mixed_RP.double() - start
        square = gradient.square()
        m = state["m"] if state else torch.zeros_like(start)
        v = state["v"] if state else torch.full_like(start, self.tau**2)
        m = self.beta1 * m + (1 - self.beta1) * gradient
        if self.kind == "fedadagrad":
            v = v + square
        elif self.kind == "fedyogi":
            v = v - (1 - self.beta2) * square * torch.sign(v - square)
        else:
            v = self.beta2 * v + (1 - self.beta2) * square
        new = start + self.server_learning_rate * m / (v.sqrt() + self.tau)
        return new.to(seen.mixed_RP.dtype), {"m": m, "v": v}


class FedOpt(Averaging):
    """Reddi et al. 2021: the mean of the updates is a gradient for an optimizer at the server.

    Its moments lie with the round (`method.m`, `method.v`): a resumed run has the same bits.
    """

    kind: Kind = "fedadam"
    """Which second moment; see `Adaptive`."""
    server_learning_rate: float = Field(default=0.01, gt=0)
    """Step size at the server. A weight moves by about this much a round, so it is of the order of
    what clients' weights move in one; it wants tuning."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment; fedadagrad has none."""
    tau: float = Field(default=1e-3, gt=0)
    """Degree of adaptivity: updates well below it are not scaled up."""

    def plan(self, meta: Meta) -> Plan:
        """One constant row, and the server's step from the round's start."""
        step = Adaptive(self.kind, self.server_learning_rate, self.beta1, self.beta2, self.tau)
        return replace(super().plan(meta), step=step)
