"""Everything that crosses a process boundary, as closed types.

There is no field here in which a token id, a title, a label or an interaction could travel: only
hidden states at the cuts, their gradients, sent adapters, one loss per client, and lengths.

Shapes: N rows, L real tokens of all rows together, d width, S clients of one actor, P parameters,
B bytes of a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fellray.platform.errors import FellrayError


@dataclass(frozen=True)
class Lease:
    """A server's permission to train some clients for one round.

    A restarted server, or a restarted client, gets a new one: messages under the old are refused.
    """

    server: str
    """Which life of the server gave it."""
    number: int


class StaleLease(RuntimeError):
    """The message belongs to a round that the server has begun again since."""


class Unheld(RuntimeError):
    """A row was named that the server does not hold (any more): send the message with all rows."""


class Damaged(FellrayError):
    """A file of a round is not what was written. The driver decides what becomes of it."""

    def __init__(self, words: str, round: int, file: str):
        """Args: file: its name in the round's folder."""
        super().__init__(words)
        self.round = round
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Damaged, (str(self), self.round, self.file)


@dataclass(frozen=True)
class Activation:
    """Hidden states at the lower cut: one step of all clients of one actor, packed."""

    run: str
    round: int
    step: int
    lease: Lease | None
    """None: no training, only the forward pass with the adapters of `round`."""
    clients: tuple[str, ...]
    row_client_N: np.ndarray
    """int32: each row's place in `clients`."""
    lengths_N: np.ndarray
    """int32: real tokens per row; the attention mask follows from it."""
    h_Ld: np.ndarray
    """fp32, or bytes of a `Codec`; of the rows that are sent."""
    names_NB: np.ndarray | None = None
    """uint8: a digest of each row's tokens in `h_Ld`, where the server holds rows."""
    sent_N: np.ndarray | None = None
    """bool: the rows that are in `h_Ld`; the server holds the others. None: all are."""

    @property
    def num_tokens(self) -> int:
        """Real tokens of all rows, sent or held."""
        return int(self.lengths_N.sum())


@dataclass(frozen=True)
class Gradient:
    """The loss's gradient at the upper cut, for the activation with the same round and step."""

    run: str
    round: int
    step: int
    g_Ld: np.ndarray
    """fp32, or bytes of a `Codec`; of one vector for each row where the server pools."""
    done: tuple[str, ...] = ()
    """Clients for whom no step follows: the trunk may lay aside what only a further one would need.
    """


@dataclass(frozen=True)
class Continuation:
    """Hidden states of tokens that follow others in texts being written.

    What came before lies in the trunk's cache, if it is still there; an answer without any token
    says that it is not, and all tokens have to be sent. Whoever holds the cache learns which of the
    texts went on (the beams), and when.
    """

    activation: Activation
    """The new tokens; without a lease."""
    text: str
    """Under what keys and values are kept: the same for all calls of one batch of texts."""
    parent_N: np.ndarray
    """int32: the row of the last call that each row goes on from; -1: they begin."""
    held_N: np.ndarray
    """int32: tokens of each row that were sent before."""
    plain: bool
    """Without anybody's adapters."""
    goes_on: bool
    """Whether another call may follow."""


@dataclass(frozen=True)
class LedgerRow:
    """What one client exchanged in one round, of one kind."""

    client: str
    kind: str
    messages: int
    bytes: int
    digest: str
    """SHA-256 over the payloads in order, 128 bits of it: holds a record against a replay."""


@dataclass(frozen=True)
class Update:
    """What an actor returns at the end of a round."""

    lives: tuple[str, ...]
    """The lives of the server in which its clients were trained."""
    clients: tuple[str, ...]
    theta_SP: np.ndarray
    """fp32: the client-side adapters that the method may mix; no columns where nothing is shared.
    """
    losses: tuple[float, ...]
    """Mean training loss per client, noised where the run says so; NaN: it is not sent."""
    samples: tuple[int, ...]
    """Histories read per client."""
    seconds: tuple[float, ...]
    """When each client was done, from the beginning of the call."""
    refused: Mapping[str, str]
    """Clients whose round cannot be used (a NaN or an infinity), and why."""


@dataclass(frozen=True)
class Installation:
    """What an actor's clients become: the mixture, or their state at the round's start."""

    round: int
    clients: tuple[str, ...]
    theta_SP: np.ndarray
    """fp32: rows follow `clients`; beside the mixture what else `LocalRule.received` names."""
    refused: tuple[str, ...] = ()
    """These go back to the round's start."""
    common: bool = False
    """The mixture is one for everyone and lies in everyone's page. All rows are the first."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Rows that are one travel once."""
        theta = self.theta_SP[:1] if self.common else self.theta_SP
        return _install, (self.round, self.clients, theta, self.refused, self.common)


def _install(
    round: int,
    clients: tuple[str, ...],
    theta: np.ndarray,
    refused: tuple[str, ...],
    common: bool,
) -> Installation:
    if common:
        theta = np.broadcast_to(theta, (len(clients), theta.shape[1]))
    return Installation(round, clients, theta, refused, common)
