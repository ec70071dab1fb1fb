"""Admission: whether a message to the trunk's host is whole, and its sender's turn.

It must not know what is computed from a message, nor where the host runs.
"""

import uuid
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass

from fellray.platform.errors import FellrayError
from fellray.platform.messages import Activation, Continuation, Gradient, Lease, StaleLease
from fellray.platform.wire import Wire


@dataclass
class Turn:
    """A client's leave to train a round."""

    round: int
    lease: int
    next_step: int = 0


class Admission:
    """To one life of one host."""

    def __init__(self, run: str, learners: Container[str], wire: Wire):
        """Args: learners: ids of everyone who may ask."""
        self.life = uuid.uuid4().hex
        self.turns: dict[str, Turn] = {}
        """Of those who are training."""
        self._run, self._wire = run, wire
        self._learners = frozenset(learners) if isinstance(learners, Sequence) else learners
        self._leases = 0

    def begin(self, round: int, clients: Sequence[str]) -> Lease:
        """Let the clients train a round; an earlier leave of theirs counts no more."""
        self._leases += 1
        self.turns |= {client: Turn(round, self._leases) for client in clients}
        return Lease(self.life, self._leases)

    def check_turns(self, round: int, clients: Sequence[str]) -> None:
        """See that all of them were trained in this life.

        Raises:
            StaleLease: they were not.
        """
        turns = [self.turns.get(c) for c in clients]
        if not all(turn and turn.round == round for turn in turns):
            raise StaleLease("the server was restarted after training")

    def check_lives(self, lives: Collection[str]) -> None:
        """See that this is the life they were trained in.

        Raises:
            StaleLease: it is not.
        """
        if any(life != self.life for life in lives):
            raise StaleLease("the server was restarted during the round")

    def check(self, activation: Activation) -> None:
        """See that a message is whole, and its sender's turn.

        Raises:
            FellrayError: it is not whole, of another run, or of a stranger.
            StaleLease: it comes from an earlier try of its round, or asks for one under way.
        """
        if activation.run != self._run:
            raise FellrayError(f"server of run {self._run} was asked by {activation.run}")
        if unknown := [c for c in activation.clients if c not in self._learners]:
            raise FellrayError(f"client {unknown[0]} does not take part in this run")
        if not (_adds_up(activation) and self._wire.fits(activation)):
            shape = f"{len(activation.lengths_N)} rows and shape {activation.h_Ld.shape}"
            raise FellrayError(f"an activation of {shape} does not add up")
        turns = [self.turns.get(c) for c in activation.clients]
        lease = activation.lease
        if lease is None:
            if any(turns):
                raise StaleLease(f"round {activation.round + 1} is being trained")
            return
        current = lease.server == self.life and all(
            turn is not None and turn.lease == lease.number for turn in turns
        )
        if not current:
            raise StaleLease(f"round {activation.round} was begun again")

    def check_step(self, activation: Activation, gradient: Gradient) -> None:
        """See that a gradient is whole, and its step due.

        Raises:
            FellrayError: it is not whole.
            StaleLease: another step is due.
        """
        if not self._wire.answers(activation, gradient):
            shapes = f"{gradient.g_Ld.shape} for hidden states of {activation.h_Ld.shape}"
            raise FellrayError(f"a gradient of shape {shapes} does not add up")
        key = (activation.run, activation.round, activation.step)
        expected = all(self.turns[c].next_step == activation.step for c in activation.clients)
        if key != (gradient.run, gradient.round, gradient.step) or not expected:
            raise StaleLease(f"step {activation.step} of round {activation.round} is not due")


def _adds_up(activation: Activation) -> bool:
    rows, places = len(activation.lengths_N), activation.row_client_N
    names, sent_N = activation.names_NB, activation.sent_N
    sent = activation.lengths_N if sent_N is None else activation.lengths_N[sent_N[:rows]]
    return bool(
        len(places) == rows > 0
        and int(activation.lengths_N.min()) > 0
        and (names is None) == (sent_N is None)
        and (names is None or sent_N is None or len(names) == len(sent_N) == rows)
        and int(sent.sum()) == len(activation.h_Ld)
        and 0 <= int(places.min()) <= int(places.max()) < len(activation.clients)
    )


def follows(continuation: Continuation) -> bool:
    """Whether a continuation says of every row what it follows."""
    parent_N, held_N = continuation.parent_N, continuation.held_N
    rows, begins = len(continuation.activation.lengths_N), bool((parent_N < 0).all())
    return len(parent_N) == len(held_N) == rows and (
        not held_N.any() if begins else int(parent_N.min()) >= 0 and int(held_N.min()) > 0
    )
