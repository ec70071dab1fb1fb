"""Ditto: a global model for all, and a personal one for each that stays near it.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021
(arXiv 2012.04221).
"""

from typing import Literal

from pydantic import Field

from fellray.platform.averaging import Averaging
from fellray.platform.local import LocalRule


class Ditto(Averaging):
    """Each client trains two models in a round (the paper's algorithm 1): the global w, as FedAvg
    does, and its own v_c, which minimises F_c(v) + lambda/2 ||v - w^t||^2. Only w is sent and
    averaged; v_c is what is evaluated, exported and served.

    A round costs two trainings, both over the cut. Whoever took no part finds the new w when it
    does, and its v_c as it left it.
    """

    kind: Literal["ditto"] = "ditto"
    pull: float = Field(default=0.1, ge=0)
    """The paper's lambda: 0 trains alone, a large one gives everybody the global model."""

    def local(self) -> LocalRule:
        """Two models, one pulled to the other."""
        return LocalRule(pull=self.pull, anchored=True, twin=True)
