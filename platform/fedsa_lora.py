"""FedSA-LoRA: clients share what LoRA's A has learnt and keep their B for themselves.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025
(arXiv 2410.01463).
"""

from dataclasses import replace
from typing import Literal

import torch

from fellray.platform.aggregation import Meta, Mixture, Plan
from fellray.platform.averaging import Averaging


class FedSaLora(Averaging):
    """Guo et al. 2024: A is averaged, B stays private; B of a client's own layers is never sent.

    Everyone starts the next round from the mean A, also those who took no part.
    """

    kind: Literal["fedsa_lora"] = "fedsa_lora"

    def sends(self, block: str) -> bool:
        """All but the B of a site."""
        return not block.endswith(".lora_B")

    def plan(self, meta: Meta) -> Plan:
        """One constant row for A, the identity for B."""
        own = Mixture(torch.eye(len(meta.clients), dtype=torch.float64))
        private = {block: own for block in meta.blocks if not self.sends(block)}
        return replace(super().plan(meta), blocks=private)
