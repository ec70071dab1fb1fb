"""A client that is measured: the `Client` of every run, with a clock at the cut and its memory told.

It trains nothing that would be kept and knows nothing of what it is compared with.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fellray.actors.client import Client
from fellray.actors.remote import RayRemote
from fellray.actors.server import make_host
from fellray.actors.world import Catalogue
from fellray.platform.config import RunConfig
from fellray.platform.encoder import Backbone, build
from fellray.platform.messages import Activation, Gradient, Lease
from fellray.platform.rounds import Rounds
from fellray.platform.trunk import InProcess

STEPS = 4
"""Local steps of one timed round."""
STATUS = Path("/proc/self/status")
"""Where Linux tells a process what it has used."""


@dataclass(frozen=True)
class Step:
    """One local step, on average over a round, in seconds."""

    wall: float
    waiting: float
    """In calls across the cut, sending and receiving included; in the whole model, the trunk."""
    forward: float
    """The part of `waiting` that is forward passes."""
    bytes: float
    """What crosses the cut."""
    tokens: float


class Timed:
    """A `Remote` that says how long its caller waited for it."""

    def __init__(self, remote: RayRemote | InProcess):
        self._remote = remote
        self.start()

    def start(self) -> None:
        """Count from nothing."""
        self.waiting = self.forwarding = 0.0
        self.tokens = 0

    @property
    def bytes(self) -> int:
        """What the remote has carried."""
        return self._remote.bytes

    def begin(self, run: str, round: int, clients: tuple[str, ...]) -> Lease:
        """See `Remote`."""
        began = time.perf_counter()
        lease = self._remote.begin(run, round, clients)
        self.waiting += time.perf_counter() - began
        return lease

    def forward(self, activation: Activation) -> np.ndarray:
        """See `Remote`."""
        self.tokens += len(activation.h_Ld)
        began = time.perf_counter()
        output = self._remote.forward(activation)
        self.forwarding += time.perf_counter() - began
        self.waiting += time.perf_counter() - began
        return output

    def backward(self, activation: Activation, gradient: Gradient) -> np.ndarray:
        """See `Remote`."""
        began = time.perf_counter()
        down = self._remote.backward(activation, gradient)
        self.waiting += time.perf_counter() - began
        return down


class MeasuredClient:
    """One client in a process of its own; without a server it holds the whole model."""

    def __init__(
        self,
        config: RunConfig,
        learner: str,
        backbone: Backbone,
        catalogue: Catalogue,
        server: Any,
        rounds: Rounds,
    ):
        remote: RayRemote | InProcess
        if server is None:
            host = make_host(config, (learner,), backbone, rounds)
            host.stage_start()
            remote = InProcess(host)
        else:
            remote = RayRemote(server)
        self._timed = Timed(remote)
        seats = {learner: (learner,)}
        self._client = Client(config, 0, seats, backbone, catalogue, self._timed, rounds)
        self._client.stage_start()

    def step(self) -> Step:
        """Train round 1 from the start, again and again the same; the average step of it."""
        far = self._timed
        far.start()
        carried, began = far.bytes, time.perf_counter()
        self._client.fit(1)
        wall = time.perf_counter() - began
        parts = (wall, far.waiting, far.forwarding, far.bytes - carried, far.tokens)
        return Step(*(part / STEPS for part in parts))

    def peak_bytes(self) -> int:
        """The most memory that this process has had resident."""
        return read_peak(STATUS.read_text(encoding="ascii"))


class Imported:
    """The same process with the same code loaded and no weights: the base line of memory."""

    def __init__(self, backbone: Backbone):
        build(backbone.select(()))

    def peak_bytes(self) -> int:
        """See `MeasuredClient`."""
        return read_peak(STATUS.read_text(encoding="ascii"))


def read_peak(status: str) -> int:
    """VmHWM in bytes, from the text of /proc/<pid>/status."""
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
