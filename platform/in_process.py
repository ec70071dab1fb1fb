"""Hosts in this process as a `Remote`: for tests and debugging, and where there is no Ray.

It counts the bytes that would cross. It must not know what a host makes of a message.
"""

from collections.abc import Callable

import numpy as np

from fellray.platform.host import TrunkHost
from fellray.platform.ledger import payload_bytes
from fellray.platform.messages import Activation, Continuation, Gradient, Lease, Unheld
from fellray.platform.span import Answer


class InProcess:
    """Hosts in this process as a `Remote`: the peer of the one behind Ray."""

    def __init__(self, *hosts: TrunkHost):
        self._hosts = hosts
        self._host = hosts[0]
        self.bytes = 0

    def choose(self, server: int) -> None:
        """See `Remote`."""
        self._host = self._hosts[server]

    def begin(
        self, run: str, round: int, clients: tuple[str, ...], twin: bool = False
    ) -> Callable[[], Lease]:
        """See `Remote`."""
        lease = self._host.begin(run, round, clients, twin)
        return lambda: lease

    def forward(self, activation: Activation) -> Answer:
        """See `Remote`."""
        (answer,) = self._host.forward([activation])
        return self._hand_over(answer, activation)

    def backward(self, activation: Activation, gradient: Gradient) -> Answer:
        """See `Remote`."""
        (answer,) = self._host.backward([(activation, gradient)])
        return self._hand_over(answer, activation, gradient)

    def _hand_over(
        self, answer: np.ndarray | Exception, *sent: Activation | Gradient | np.ndarray
    ) -> Answer:
        if isinstance(answer, Exception):
            if isinstance(answer, Unheld):
                self.bytes += payload_bytes(*sent)
            raise_later = answer
            return lambda: _refuse(raise_later)
        self.bytes += payload_bytes(*sent, answer)
        return lambda: answer

    def extend(self, continuation: Continuation) -> Answer:
        """See `Remote`."""
        (answer,) = self._host.extend([continuation])
        places = (continuation.parent_N, continuation.held_N)
        return self._hand_over(answer, continuation.activation, *places)


def _refuse(error: Exception) -> np.ndarray:
    raise error
