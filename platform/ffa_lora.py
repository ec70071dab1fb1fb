"""FFA-LoRA: the adapters' A stays as it was drawn, so that an average of products is exact.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (arXiv 2403.12313).
"""

from typing import Literal

from fellray.platform.averaging import Averaging
from fellray.platform.local import LocalRule


class FfaLora(Averaging):
    """A is frozen at the start that all clients share, only B trains, travels and is averaged: the
    mean of the products B_c A is the product of the mean of the B_c with A (the paper's section 4).

    Half of LoRA's moments and about half of an update's bytes are not needed; A is in no message
    of a client. An adapter that the servers train for everyone (`server.shared_adapter`) is one
    copy, is not averaged, and trains both factors.
    """

    kind: Literal["ffa_lora"] = "ffa_lora"

    def local(self) -> LocalRule:
        """Only B trains."""
        return LocalRule(freezes_a=True)

    def sends(self, block: str) -> bool:
        """B alone: everybody has A."""
        return block.endswith(".lora_B")
