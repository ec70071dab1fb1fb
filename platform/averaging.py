"""Averaging: everybody receives one mean. What clients do before that is a method's own affair.

It must not know which methods average, nor what a mean is used for.
"""

from collections.abc import Collection
from typing import Literal

import torch

from fellray.platform.aggregation import Meta, Method, Plan, Source


class Averaging(Method):
    """What FedAvg and its relatives have in common."""

    weighting: Literal["uniform", "samples"] = "uniform"
    """Every client counts the same, or by the histories it read this round."""

    def compares(self) -> Collection[Source]:
        """Nobody with anybody."""
        return ()

    def plan(self, meta: Meta) -> Plan:
        """One constant row."""
        weights = torch.ones_like(meta.samples_C) if self.weighting == "uniform" else meta.samples_C
        return Plan((weights / weights.sum()).repeat(len(weights), 1), common=True)
