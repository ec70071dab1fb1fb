"""SCAFFOLD: FedAvg whose clients correct each step by where the others would go.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020
(arXiv 1910.06378). The control variates' formulas stand in `platform/local.py`.
"""

from collections.abc import Collection
from typing import Literal

from fellray.platform.aggregation import Meta, Method, Plan, Source, mean_row
from fellray.platform.local import LocalRule


class Scaffold(Method):
    """A local step is y <- y - lr (g(y) - c_i + c) (the paper's equation 3), the control variates
    move by option II, and the server's step is 1: x <- mean of the y_i.

    It is stated for SGD and needs `train.optimizer=sgd`. c_i stays with its client; what the server
    needs for c follows from the y_i, so nothing more than FedAvg's is sent up; c comes down beside
    x. With c = c_i = 0, in the first round, it is FedAvg with SGD.
    """

    kind: Literal["scaffold"] = "scaffold"

    def compares(self) -> Collection[Source]:
        """Nobody with anybody."""
        return ()

    def local(self) -> LocalRule:
        """With control variates."""
        return LocalRule(controls=True)

    def plan(self, meta: Meta) -> Plan:
        """One constant row."""
        row_C = mean_row(meta, "uniform")
        return Plan(row_C.repeat(len(row_C), 1), common=True)
