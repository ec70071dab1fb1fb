"""Clients that are measured: each in a process of its own, which tells its clock and its memory.

One is the `Client` of every run with a clock at the cut, one has the whole model. It trains nothing
that would be kept and knows nothing of what it is compared with.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fellray.actors.client import Client
from fellray.actors.remote import RayRemote
from fellray.actors.world import Catalogue
from fellray.jobs.whole import Whole
from fellray.platform.config import RunConfig
from fellray.platform.encoder import Backbone, build
from fellray.platform.manifest import Staged
from fellray.platform.messages import Activation, Continuation, Gradient, Lease
from fellray.platform.rounds import Rounds
from fellray.platform.span import Answer

STATUS = Path("/proc/self/status")
"""Where Linux tells a process what it has used."""


@dataclass(frozen=True)
class Step:
    """One local step, on average over a round."""

    wall: float
    """Seconds."""
    waiting: float
    """Seconds of it in calls across the cut, sending and receiving included."""
    bytes: float
    """What crossed the cut."""


class Timed:
    """A `Remote` that says how long its caller waited for it."""

    def __init__(self, remote: RayRemote):
        self._remote = remote
        self.waiting = 0.0

    @property
    def bytes(self) -> int:
        """What the remote has carried."""
        return self._remote.bytes

    def choose(self, server: int) -> None:
        """See `Remote`."""
        self._remote.choose(server)

    def begin(
        self, run: str, round: int, clients: tuple[str, ...], twin: bool = False
    ) -> Callable[[], Lease]:
        """See `Remote`."""
        with self._clock():
            asked = self._remote.begin(run, round, clients, twin)

        def leave() -> Lease:
            with self._clock():
                return asked()

        return leave

    def extend(self, continuation: Continuation) -> Answer:
        """See `Remote`."""
        with self._clock():
            return self._await(self._remote.extend(continuation))

    def forward(self, activation: Activation) -> Answer:
        """See `Remote`."""
        with self._clock():
            return self._await(self._remote.forward(activation))

    def backward(self, activation: Activation, gradient: Gradient) -> Answer:
        """See `Remote`."""
        with self._clock():
            return self._await(self._remote.backward(activation, gradient))

    def _await(self, asked: Answer) -> Answer:
        def answer() -> np.ndarray:
            with self._clock():
                return asked()

        return answer

    @contextmanager
    def _clock(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - began


class ClockedClient(Client):
    """The client actor of every run, with a clock at the cut."""

    def __init__(
        self,
        config: RunConfig,
        index: int,
        seats: Mapping[str, Sequence[str]],
        backbone: Backbone,
        catalogue: Catalogue,
        remote: RayRemote,
        *rest: Any,
    ):
        """See `Client`."""
        self._timed = Timed(remote)
        super().__init__(config, index, seats, backbone, catalogue, self._timed, *rest)


class Weighed:
    """A process that knows its peak memory."""

    def peak_bytes(self) -> int:
        """The most memory that this process has had resident."""
        return read_peak(STATUS.read_text(encoding="ascii"))


class Imported(Weighed):
    """All code loaded and no weights: the base line of memory."""

    def __init__(self, backbone: Backbone):
        build(backbone.select(()))


class SplitClient(Weighed):
    """Bottom and top here, the trunk behind a server actor."""

    def __init__(
        self,
        config: RunConfig,
        learner: str,
        backbone: Backbone,
        catalogue: Catalogue,
        remote: RayRemote,
        rounds: Rounds,
    ):
        self._steps = count_steps(config)
        self._timed = Timed(remote)
        seats = {learner: (learner,)}
        self._client = Client(config, 0, seats, backbone, catalogue, self._timed, rounds)
        self._learner = learner

    def stage_start(self) -> tuple[Staged, ...]:
        """See `Client.stage_start`."""
        return self._client.stage_start()

    def step(self) -> Step:
        """Train round 1 from the start, again and again the same; the average step of it."""
        waited, carried = self._timed.waiting, self._timed.bytes
        began = time.perf_counter()
        self._client.fit(1, (self._learner,))
        parts = (
            time.perf_counter() - began,
            self._timed.waiting - waited,
            self._timed.bytes - carried,
        )
        return Step(*(part / self._steps for part in parts))


class WholeClient(Weighed):
    """The whole model here, trained the ordinary way."""

    def __init__(self, config: RunConfig, learner: str, backbone: Backbone, catalogue: Catalogue):
        self._steps = count_steps(config)
        self._whole = Whole(config, (learner,), backbone, catalogue)

    def step(self) -> Step:
        """See `SplitClient`."""
        began = time.perf_counter()
        self._whole.fit(1)
        return Step((time.perf_counter() - began) / self._steps, 0.0, 0.0)


def count_steps(config: RunConfig) -> int:
    """Local steps of a round of one client."""
    return -(-config.train.local_samples // config.train.batch_size)


def read_peak(status: str) -> int:
    """VmHWM in bytes, from the text of /proc/<pid>/status."""
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
