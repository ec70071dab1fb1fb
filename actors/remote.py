"""The trunk behind an actor handle: `platform.span.Remote` over Ray.

It counts the bytes that it carries, independently of the ledger. The recomputing backward pass
needs the activation again: it lies in the object store since the forward call and is only named.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fellray.actors.losses import LOST, name_cause, tell
from fellray.actors.session import ray
from fellray.platform.ledger import payload_bytes
from fellray.platform.messages import (
    Activation,
    Continuation,
    Gradient,
    Lease,
    StaleLease,
    Unheld,
)
from fellray.platform.span import Answer


class RayRemote:
    """A `Remote` whose far side is one of the server actors."""

    def __init__(self, servers: Sequence[Any]):
        """Args: servers: the actors' handles."""
        self._servers = list(servers)
        self._server, self._chosen = self._servers[0], 0
        self._packed = ray.cloudpickle.dumps(self._servers)
        self._sent: dict[int, tuple[Activation, Any]] = {}
        """By identity: what waits for its backward pass, and where it lies."""
        self.bytes = 0

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        # As bytes made beforehand: Ray takes a handle among constructor arguments for an object
        # that may be lost, and warns on the terminal. The server outlives its clients.
        return _unpack, (self._packed,)

    def choose(self, server: int) -> None:
        """See `Remote`."""
        self._server, self._chosen = self._servers[server], server

    def begin(
        self, run: str, round: int, clients: tuple[str, ...], twin: bool = False
    ) -> Callable[[], Lease]:
        """See `Remote`."""
        self._sent.clear()  # of a round that was given up
        asked = self._server.begin.remote(run, round, clients, twin)

        def leave() -> Lease:
            lease: Lease = self._wait(asked)
            return lease

        return leave

    def forward(self, activation: Activation) -> Answer:
        """See `Remote`."""
        reference = ray.put(activation)
        if activation.lease and activation.names_NB is None:
            self._sent[id(activation)] = (activation, reference)
        asked = self._server.forward.remote(reference)

        def answer() -> np.ndarray:
            return self._await(asked, activation)

        return answer

    def backward(self, activation: Activation, gradient: Gradient) -> Answer:
        """See `Remote`."""
        _, reference = self._sent.pop(id(activation), (None, None))
        asked = self._server.backward.remote(reference or activation, gradient)

        def answer() -> np.ndarray:
            return self._await(asked, activation, gradient)

        return answer

    def extend(self, continuation: Continuation) -> Answer:
        """See `Remote`."""
        asked = self._server.extend.remote(continuation)

        def answer() -> np.ndarray:
            output: np.ndarray = self._wait(asked)
            places = (continuation.parent_N, continuation.held_N)
            self.bytes += payload_bytes(continuation.activation, *places, output)
            return output

        return answer

    def _await(self, asked: Any, *sent: Activation | Gradient) -> np.ndarray:
        try:
            answer: np.ndarray = self._wait(asked)
        except Unheld:
            self.bytes += payload_bytes(*sent)
            raise
        self.bytes += payload_bytes(*sent, answer)
        return answer

    def _wait(self, asked: Any) -> Any:
        """The answer.

        Raises:
            StaleLease: the server was lost, and the round's work on it.
            FellrayError: it ran out of memory.
        """
        try:
            return ray.get(asked)
        except ray.exceptions.RayTaskError as error:
            raise tell(error, "server", f"server actor {self._chosen}") from None
        except LOST as error:
            raise StaleLease(f"a server was lost ({name_cause(error)})") from None


def _unpack(handles: bytes) -> RayRemote:
    return RayRemote(ray.cloudpickle.loads(handles))
