"""A server's step: from the round's start, over the mixture of what clients sent, to the new state.

Most methods have none: the mixture is the new state. A step is a pure function of the start, the
mixture and its own state; the state is a committed page of the round, so that a round that is done
again or resumed gives the same bits. It must not know who the clients are, nor where pages lie.

Shapes: R rows (one, where all clients have one state), C clients, P parameters of one client.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

State = Mapping[str, Tensor]
"""By name; empty before the first step."""

RESIDUAL = "residual."
"""State ``residual.<projection>`` [d_out, d_in], fp32, is added to that projection's frozen
weights, times the adapters' scale: see `Method.moves_base`."""


@dataclass(frozen=True)
class Snapshot:
    """What a step may look at; it leaves all of it as it is."""

    start_RP: Tensor
    """What the rows were at the round's start."""
    mixed_RP: Tensor
    """The mixtures."""
    sent_CP: Tensor
    """What was mixed."""
    blocks: Mapping[str, slice]
    """Block -> its columns."""
    rank: int
    """Of all adapters, for those who look at a block as a matrix."""


class ServerStep(Protocol):
    """What a plan may ask for after the mixing."""

    def take(self, seen: Snapshot, state: State) -> tuple[Tensor, State]:
        """The new rows, in the dtype of the mixture, and the new state.

        Args:
            state: what the last step of the run returned; it stays as it is.
        """
        ...


@dataclass(frozen=True)
class Partway:
    """``start + share * (mixture - start)``: the law of aggregation with a rate below one."""

    share: float
    """How far to go towards the mixture, above 0; 1: all the way."""

    def take(self, seen: Snapshot, state: State) -> tuple[Tensor, State]:
        """See `ServerStep`; in fp64, without state."""
        start = seen.start_RP.double()
        new = start + self.share * (seen.mixed_RP.double() - start)
        return new.to(seen.mixed_RP.dtype), {}
