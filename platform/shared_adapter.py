"""The trunk adapter that all clients share: its state, and what each client's round adds to it.

Where the run has none, calls do nothing. It must not know who trains, nor how the engine steps it.

Shapes: S slots, C clients, P parameters of the adapter.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fellray.platform.adapters import Site
from fellray.platform.config import RunConfig
from fellray.platform.faults import committed
from fellray.platform.gradient_sum import GradientSum
from fellray.platform.manifest import Staged
from fellray.platform.rounds import Rounds
from fellray.platform.trunk import Engine


class SharedAdapter:
    """One host's, in the rounds of a run."""

    def __init__(
        self,
        config: RunConfig,
        sites: Sequence[Site],
        engine: Engine,
        rounds: Rounds,
        device: torch.device | None,
    ):
        self.there = config.server.shared_adapter
        """Whether the run has one."""
        self._rank, self._sites, self._device = config.model.lora.r, sites, device
        self._engine, self._rounds = engine, rounds
        self.gradient = GradientSum(sites, self._rank, 0, device)
        """What the round has added so far, by slot; replaced when it grows."""
        self._summed: dict[str, Tensor] = {}
        """The share [P] of clients who are through with the round."""
        self._round = -1

    def start(self, seeded_P: Tensor) -> None:
        """Put it to the seeded start."""
        if self.there:
            self._engine.load_shared({"values": seeded_P})
            self._round = 0

    def bring(self, round: int) -> None:
        """Put it to its state at a committed round."""
        if self.there and round != self._round:
            kinds = ("values", "moment1", "moment2", "steps")
            with committed(self._rounds, round):
                state = {kind: self._rounds.load_shared(round, f"shared.{kind}") for kind in kinds}
            self._engine.load_shared(state)
            self._round = round

    def begin(self, clients: Sequence[str], slots: Tensor, num_slots: int) -> None:
        """The clients in these slots, of so many, begin a round."""
        if not self.there:
            return
        self.fit(num_slots)
        self.gradient.total_SP[slots] = 0.0
        for client in clients:
            self._summed.pop(client, None)

    def fit(self, num_slots: int) -> None:
        """Make room for so many slots."""
        old = self.gradient.total_SP
        if len(old) < num_slots:
            self.gradient = GradientSum(self._sites, self._rank, num_slots, self._device)
            self.gradient.total_SP[: len(old)] = old

    def left(self, clients: Sequence[str]) -> list[str]:
        """Who of them is not through with the round."""
        return [c for c in clients if c not in self._summed] if self.there else []

    def finish(self, clients: Sequence[str], slots: Tensor) -> None:
        """The clients in these slots add nothing more in this round."""
        if self.there:
            rows = self.gradient.total_SP[slots]
            self._summed |= dict(zip(clients, rows, strict=True))

    def rows(self, clients: Sequence[str]) -> np.ndarray:
        """What each client's round adds to the gradient [C, P]."""
        width = self.gradient.total_SP.shape[1]
        rows = [self._summed[c].cpu() for c in clients]
        return (torch.stack(rows) if rows else torch.empty(0, width)).numpy()

    def step(self, gradient_P: np.ndarray | None, round: int) -> None:
        """End a round with a step, where there is a gradient [P]."""
        if self.there:
            if gradient_P is not None:
                self._engine.step_shared(from_dlpack(gradient_P).to(self._device))
            self.gradient.total_SP.zero_()
            self._round = round

    def stage(self, round: int) -> tuple[Staged, ...]:
        """Its state as a file of the round."""
        if not self.there:
            return ()
        state = {f"shared.{name}": t for name, t in self._engine.shared_state().items()}
        return (self._rounds.stage(round, "shared", (), state),)

    def clear(self) -> None:
        """Nobody is through with a round."""
        self._summed.clear()

    def forget(self) -> None:
        """The next `bring` reads."""
        self._summed.clear()
        self._round = -1
