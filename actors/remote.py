"""The trunk behind an actor handle: `platform.span.Remote` over Ray.

It counts the bytes that it carries, independently of the ledger. The recomputing backward pass
needs the activation again: it lies in the object store since the forward call and is only named.
"""

from typing import Any

import numpy as np

from fellray.actors.session import ray
from fellray.platform.ledger import payload_bytes
from fellray.platform.messages import Activation, Gradient, Lease


class RayRemote:
    """A `Remote` whose far side is a server actor."""

    def __init__(self, server: Any):
        """`server` is the actor's handle."""
        self._server = server
        self._packed = ray.cloudpickle.dumps(server)
        self._sent: tuple[Activation, Any] | None = None
        self.bytes = 0

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        # As bytes made beforehand: Ray takes a handle among constructor arguments for an object
        # that may be lost, and warns on the terminal. The server outlives its clients.
        return _unpack, (self._packed,)

    def begin(self, run: str, round: int, clients: tuple[str, ...]) -> Lease:
        """See `Remote`."""
        lease: Lease = ray.get(self._server.begin.remote(run, round, clients))
        return lease

    def forward(self, activation: Activation) -> np.ndarray:
        """See `Remote`."""
        reference = ray.put(activation)
        self._sent = (activation, reference)
        output: np.ndarray = ray.get(self._server.forward.remote(reference))
        self.bytes += payload_bytes(activation, output)
        return output

    def backward(self, activation: Activation, gradient: Gradient) -> np.ndarray:
        """See `Remote`."""
        sent, reference = self._sent or (None, None)
        argument = reference if sent is activation else activation
        down: np.ndarray = ray.get(self._server.backward.remote(argument, gradient))
        self._sent = None
        self.bytes += payload_bytes(activation, gradient, down)
        return down


def _unpack(handle: bytes) -> RayRemote:
    return RayRemote(ray.cloudpickle.loads(handle))
