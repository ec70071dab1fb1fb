"""The residual: what a method adds to the frozen weights under everybody's adapters.

Some means of adapters are no adapter of their rank (FedEx-LoRA); what is left over belongs to a
round's state as the adapters do, and is one for all clients. Frozen weights lie in memory that many
processes read, so a projection with a residual gets weights of its own. Where the method has none,
calls do nothing. It must not know how a residual comes about, nor who computes with the weights.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fellray.platform.adapters import LoraLinear, Site
from fellray.platform.config import RunConfig
from fellray.platform.faults import committed
from fellray.platform.handover import METHOD
from fellray.platform.rounds import Rounds
from fellray.platform.server_step import RESIDUAL

_STEP = f"{METHOD}{RESIDUAL}"


class Residual:
    """Of one side of the cut, in the rounds of a run."""

    def __init__(
        self,
        config: RunConfig,
        sites: Sequence[Site],
        adapted: Sequence[LoraLinear],
        rounds: Rounds,
    ):
        """Args: adapted: the projections at these sites, frozen as the public model has them."""
        self._there = config.method.moves_base()
        self._scaling, self._rounds = config.model.lora.scaling, rounds
        # where nothing is added a projection may have several sites
        own = zip(sites, adapted, strict=True) if self._there else ()
        self._held = {site.path: (module, module.base.weight) for site, module in own}
        self._round = 0
        self.added: Mapping[str, Tensor] = {}
        """Projection -> what it has more of ``B A`` [d_out, d_in] than the public model."""
        self.numbers = np.empty(0, np.float32)
        """All of `added`, as a client receives it."""

    def bring(self, round: int) -> None:
        """Make the weights those of a round's state.

        Raises:
            StaleLease: the round was lost before it was committed.
            FellrayError: a file of it is damaged.
        """
        if not self._there or round == self._round:
            return
        with committed(self._rounds, round):
            self.added = load_residual(self._rounds, round, self._held)
        flat = [residual.flatten() for residual in self.added.values()]
        self.numbers = torch.cat(flat).numpy() if flat else np.empty(0, np.float32)
        for path, (module, frozen) in self._held.items():
            module.base.weight = frozen
            if path in self.added:
                weight = add(frozen, self.added[path], self._scaling)
                module.base.weight = nn.Parameter(weight, requires_grad=False)
        self._round = round

    def forget(self) -> None:
        """The next `bring` reads."""
        self._round = -1 if self._there else 0


def load_residual(rounds: Rounds, round: int, paths: Mapping[str, object]) -> dict[str, Tensor]:
    """Projection -> its residual at a round's state, of those that have one.

    Raises:
        Uncommitted: the round is not committed.
        FellrayError: a file of it is damaged.
    """
    held = {
        name.removeprefix(_STEP): name for name in rounds.shared(round) if name.startswith(_STEP)
    }
    return {path: rounds.load_shared(round, held[path]) for path in paths if path in held}


def add(weight: Tensor, residual: Tensor, scaling: float) -> Tensor:
    """``weight + scaling * residual``, in the weight's precision and place; a new tensor."""
    moved = weight.float() + scaling * residual.to(weight.device, torch.float32)
    return moved.to(weight.dtype)
