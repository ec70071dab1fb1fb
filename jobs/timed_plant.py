"""A plant that tells where the seconds of a round went. The bits are those of any other plant.

A client's round is work of its own and calls across the cut; a call is the way there and back, a
wait in the server's queue, and the trunk's work on the batch that the call was merged into. Only
differences of one process's clock are taken, so clocks of different nodes need not agree.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fellray.actors.plant import Plant
from fellray.actors.server import Server
from fellray.jobs.measured import ClockedClient
from fellray.jobs.process_tree import read_pss
from fellray.platform.host import TrunkHost
from fellray.platform.messages import Activation, Gradient, Lease, Update


@dataclass(frozen=True)
class ClientTimes:
    """One client actor's round."""

    fit: float
    """Seconds of local training."""
    cut: float
    """Seconds of it in calls across the cut."""
    pss: int
    """Bytes that its process weighs now."""


@dataclass
class ServerTimes:
    """The server's round."""

    stayed: float = 0.0
    """Seconds that calls were in the server's process, all calls added."""
    worked: float = 0.0
    """Seconds that the trunk worked on them, counted once for each call of a batch."""
    calls: list[int] = field(default_factory=list)
    """Calls in each batch."""
    tokens: list[int] = field(default_factory=list)
    """Tokens in each batch."""

    def add(self, other: "ServerTimes") -> None:
        """Count another server's in."""
        self.stayed += other.stayed
        self.worked += other.worked
        self.calls += other.calls
        self.tokens += other.tokens


@dataclass(frozen=True)
class Split:
    """Where a round's seconds went, on average over the actors that had something to train.

    While one crew waits another works: of transfer, trunk and queue counts what an actor saw.
    """

    seconds: float
    """The round, as the driver sees it; the others add up to it."""
    own: float
    """Compute: bottom, top and adapters on the client."""
    trunk: float
    """Compute: the trunk's work on the batches."""
    transfer: float
    """Messages packed, carried, unpacked; Ray's calls."""
    queue: float
    """Wait: until the server took the call up."""
    slowest: float
    """Wait: for the actor that finished last."""
    driver: float
    """Mixing, installing and committing; what an actor that was lost cost."""


class TimedClient(ClockedClient):
    """A client actor that tells how long its rounds took."""

    _fit_s = 0.0

    def fit(self, round: int, clients: Sequence[str], *rest: Any) -> Update:
        """See `Client.fit`."""
        self._timed.waiting = 0.0
        began = time.perf_counter()
        update = super().fit(round, clients, *rest)
        self._fit_s = time.perf_counter() - began if clients else 0.0
        return update

    def times(self) -> ClientTimes:
        """Of its last round."""
        return ClientTimes(self._fit_s, self._timed.waiting, read_pss(os.getpid()))


class _ClockedHost:
    """A host whose batches are counted."""

    def __init__(self, host: TrunkHost, times: ServerTimes):
        self._host = host
        self.times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def forward(self, activations: Sequence[Activation]) -> list[np.ndarray | Exception]:
        began = time.perf_counter()
        answers = self._host.forward(activations)
        if activations[0].lease:
            self._count(began, [a.num_tokens for a in activations])
        return answers

    def backward(self, sent: Sequence[tuple[Activation, Gradient]]) -> list[np.ndarray | Exception]:
        began = time.perf_counter()
        answers = self._host.backward(sent)
        self._count(began, [a.num_tokens for a, _ in sent])
        return answers

    def _count(self, began: float, sizes: Sequence[int]) -> None:
        self.times.worked += len(sizes) * (time.perf_counter() - began)
        self.times.calls.append(len(sizes))
        self.times.tokens.append(sum(sizes))


class TimedServer(Server):
    """A server that counts its batches and how long calls stay."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        clocked: Any = _ClockedHost(self._host, ServerTimes())
        self._host = clocked
        self._clocked = clocked
        self._ready_at = time.time()

    async def begin(
        self, run: str, round: int, clients: tuple[str, ...], twin: bool = False
    ) -> Lease:
        """See `Server.begin`."""
        began = time.perf_counter()
        lease = await super().begin(run, round, clients, twin)
        self._clocked.times.stayed += time.perf_counter() - began
        return lease

    async def forward(self, activation: Activation) -> np.ndarray:
        """See `Server.forward`."""
        began = time.perf_counter()
        output = await super().forward(activation)
        if activation.lease:  # an evaluation is no part of what is split
            self._clocked.times.stayed += time.perf_counter() - began
        return output

    async def backward(self, activation: Activation, gradient: Gradient) -> np.ndarray:
        """See `Server.backward`."""
        began = time.perf_counter()
        down = await super().backward(activation, gradient)
        self._clocked.times.stayed += time.perf_counter() - began
        return down

    async def ready_at(self) -> float:
        """When it had loaded the trunk: `time.time()`."""
        return self._ready_at

    async def close_times(self) -> ServerTimes:
        """Since the last call."""
        times: ServerTimes = self._clocked.times
        self._clocked.times = ServerTimes()
        return times


class TimedPlant(Plant):
    """A plant of timed actors. Make it with `on_ray`."""

    _client = TimedClient
    _server = TimedServer

    def ready_at(self) -> float:
        """When the server was there, and the client actors were asked for: `time.time()`."""
        return float(max(self._servers.pool.map("ready_at")))

    def close_times(self) -> tuple[list[ClientTimes], ServerTimes]:
        """Of the round that has just ended."""
        total = ServerTimes()
        for server in self._servers.pool.map("close_times"):
            total.add(server)
        return self._clients.map("times"), total


def split_round(seconds: float, clients: Sequence[ClientTimes], server: ServerTimes) -> Split:
    """Where a round's seconds went."""
    busy = [one for one in clients if one.fit > 0]
    count = max(1, len(busy))
    fit = sum(one.fit for one in busy) / count
    cut = sum(one.cut for one in busy) / count
    stayed, trunk = server.stayed / count, server.worked / count
    seen = min(1.0, cut / stayed) if stayed else 0.0
    last = max((one.fit for one in busy), default=0.0)
    return Split(
        seconds,
        fit - cut,
        trunk * seen,
        max(0.0, cut - stayed),
        (stayed - trunk) * seen,
        last - fit,
        seconds - last,
    )
