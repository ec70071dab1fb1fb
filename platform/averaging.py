"""Averaging: everybody receives one mean. What clients do before that is a method's own affair.

It must not know which methods average, nor what a mean is used for.
"""

from collections.abc import Collection

from fellray.platform.aggregation import Meta, Method, Plan, Source, Weighting, mean_row


class Averaging(Method):
    """What FedAvg and its relatives have in common."""

    weighting: Weighting = "uniform"
    """Every client counts the same, or by the histories it read this round."""

    def compares(self) -> Collection[Source]:
        """Nobody with anybody."""
        return ()

    def reads_losses(self) -> bool:
        """No."""
        return False

    def plan(self, meta: Meta) -> Plan:
        """One constant row."""
        row_C = mean_row(meta, self.weighting)
        return Plan(row_C.repeat(len(row_C), 1), common=True)
