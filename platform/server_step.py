"""A server's step: from the round's start, over the mixture of what clients sent, to the new state.

Most methods have none: the mixture is the new state. A step is a pure function of the start, the
mixture and its own state; the state is a committed page of the round, so that a round that is done
again or resumed gives the same bits. It must not know who the clients are, nor where pages lie.

Shapes: R rows (one, where all clients have one state), P parameters of one client.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

State = Mapping[str, Tensor]
"""By name; empty before the first step."""


class ServerStep(Protocol):
    """What a plan may ask for after the mixing."""

    def take(self, start_RP: Tensor, mixed_RP: Tensor, state: State) -> tuple[Tensor, State]:
        """The new rows, in the dtype of the mixture, and the new state; arguments stay as they are.

        Args:
            start_RP: what the rows were at the round's start.
            mixed_RP: the mixtures.
            state: what the last step of the run returned.
        """
        ...


@dataclass(frozen=True)
class Partway:
    """``start + share * (mixture - start)``: the law of aggregation with a rate below one."""

    share: float
    """How far to go towards the mixture, above 0; 1: all the way."""

    def take(self, start_RP: Tensor, mixed_RP: Tensor, state: State) -> tuple[Tensor, State]:
        """See `ServerStep`; in fp64, without state."""
        start = start_RP.double()
        return (start + self.share * (mixed_RP.double() - start)).to(mixed_RP.dtype), {}
