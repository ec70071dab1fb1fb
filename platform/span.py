"""Both ways over the cut, as a client sees them: ask now, have the answer later.

`Remote` has three peers that are equals: the trunk in this process, the trunk behind Ray, and a
test's double. Nothing here knows which one it is, nor what is computed between two crossings.

Shapes: L real tokens of all rows together, d width.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from fellray.platform.ledger import Ledger
from fellray.platform.messages import Activation, Continuation, Gradient, Lease, Unheld
from fellray.platform.recall import Known, leave_out_all, rows_sent

Result = TypeVar("Result")

Answer = Callable[[], np.ndarray]
"""Waits for what was asked, once."""

Trip = Generator[Answer, np.ndarray, Result]
"""Work that hands over what it has asked for and goes on when it is given the answer."""


class Remote(Protocol):
    """The far side of the cut."""

    def choose(self, server: int) -> None:
        """Ask this server from now on, where there are several."""
        ...

    def begin(
        self, run: str, round: int, clients: tuple[str, ...], twin: bool = False
    ) -> Callable[[], Lease]:
        """Ask to put the clients' trunk adapters to the round's start: the leave for its steps.

        Args:
            twin: it is their anchors that train: see `local.LocalRule`.
        """
        ...

    def forward(self, activation: Activation) -> Answer:
        """Ask for the trunk's hidden states at the upper cut [L, d]."""
        ...

    def backward(self, activation: Activation, gradient: Gradient) -> Answer:
        """Ask to backpropagate and to step the rows' trunk adapters: the gradient at the lower cut.

        The activation comes again: the trunk may not have kept the forward pass (recompute).
        """
        ...

    def extend(self, continuation: Continuation) -> Answer:
        """Ask for the trunk's hidden states [L, d] of tokens that follow others; none if what came
        before is lost."""
        ...


class Span:
    """The way to the trunk and back; what crosses is entered in a ledger."""

    def __init__(self, remote: Remote, ledger: Ledger):
        self.remote = remote
        self._ledger = ledger
        self._known = Known()
        self._server = 0

    def choose(self, server: int) -> None:
        """Ask this server from now on, where there are several."""
        if server != self._server:
            self._known.forget()
        self._server = server
        self.remote.choose(server)

    def forward(self, activation: Activation) -> Answer:
        """One crossing up and one down [L, d]; rows with names that the server has stay here.

        Args:
            activation: with all its rows.
        """
        sent = self._known.leave_out(activation)
        asked = self.remote.forward(sent)

        def answer() -> np.ndarray:
            try:
                output = asked()
            except Unheld:
                self._enter_up(sent, None)
                self._known.forget()
                output = self.remote.forward(activation)()
                self._enter_up(activation, None)
            else:
                self._enter_up(sent, None)
            self._known.add(activation)
            kind = "output" if activation.lease else "evaluation_output"
            self._enter(activation, kind, output)
            return output

        return answer

    def backward(self, activation: Activation, gradient: Gradient) -> Answer:
        """One crossing up, the activation again where its rows have no names, and one down
        [L, d].

        Args:
            activation: with all its rows.
        """
        sent = leave_out_all(activation)
        asked = self.remote.backward(sent, gradient)

        def answer() -> np.ndarray:
            try:
                down = asked()
            except Unheld:
                self._enter_up(sent, gradient)
                self._known.forget()
                down = self.remote.backward(activation, gradient)()
                self._enter_up(activation, gradient)
            else:
                self._enter_up(sent, gradient)
            self._enter(activation, "input_gradient", down)
            return down

        return answer

    def extend(self, continuation: Continuation) -> Answer:
        """One crossing up and one down, of new tokens [L, d]; see `Remote.extend`."""
        asked, activation = self.remote.extend(continuation), continuation.activation

        def answer() -> np.ndarray:
            output = asked()
            self._ledger.enter_rows(activation, "evaluation_activation", activation.h_Ld)
            self._ledger.enter_rows(activation, "evaluation_output", output)
            self._ledger.enter_envelope(activation)
            self._ledger.enter_places(activation, continuation.parent_N, continuation.held_N)
            return output

        return answer

    def _enter_up(self, sent: Activation, gradient: Gradient | None) -> None:
        """A message that went up, whether it was of use or not."""
        kind = "activation" if sent.lease else "evaluation_activation"
        if gradient is not None:
            self._enter(sent, "gradient", gradient.g_Ld)
            kind = "activation_repeat"
        self._ledger.enter_rows(rows_sent(sent), kind, sent.h_Ld)
        self._ledger.enter_envelope(sent)

    def _enter(self, message: Activation, kind: str, crossed: np.ndarray) -> None:
        """What has a token, or one vector, for each of the message's."""
        if len(crossed) == len(message.lengths_N) != message.num_tokens:
            message = replace(message, lengths_N=np.ones_like(message.lengths_N))
        if len(crossed):
            self._ledger.enter_rows(message, kind, crossed)


def take_turns(trips: Iterable[Trip[Result]]) -> list[Result]:
    """All trips to their end, one working here while the others' answers are on their way.

    Turns go round in a fixed order, so what a trip sees does not depend on who answers first.
    """
    trips = list(trips)
    results: dict[int, Result] = {}
    waiting: deque[tuple[int, Answer]] = deque()

    def advance(at: int, answer: np.ndarray | None) -> None:
        try:
            # a trip that has not begun takes no answer
            asked = next(trips[at]) if answer is None else trips[at].send(answer)
        except StopIteration as end:
            results[at] = end.value
        else:
            waiting.append((at, asked))

    for at in range(len(trips)):
        advance(at, None)
    while waiting:
        at, answer = waiting.popleft()
        advance(at, answer())
    return [results[at] for at in range(len(trips))]
