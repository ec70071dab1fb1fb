"""FedProx: FedAvg whose clients are held back from drifting.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (arXiv 1812.06127).
"""

from typing import Literal

from pydantic import Field

from fellray.platform.averaging import Averaging
from fellray.platform.local import LocalRule


class FedProx(Averaging):
    """A client minimises F_c(theta) + mu/2 ||theta - theta^t||^2 (the paper's equation 2), theta^t
    being the weights that it starts the round from; then all are averaged.

    With mu = 0 it is FedAvg, bit for bit.
    """

    kind: Literal["fedprox"] = "fedprox"
    mu: float = Field(default=0.1, ge=0)
    """Strength of the pull to the start of the round. The paper tunes it among 0.001 and 1."""

    def local(self) -> LocalRule:
        """Pulled to the start of the round."""
        return LocalRule(pull=self.mu)
