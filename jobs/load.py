"""Load: requests that come when they come (open loop) or when the last is answered (closed loop).

In an open loop a latency counts from the moment at which the request was due, not from the one at
which it could be sent: whoever waits for a slow service is counted as waiting. It must not know
what is asked, nor what an answer says.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fellray.jobs.tally import OK, Tally, count_load
from fellray.jobs.wire import Connection, Target, connect

TIMEOUT_S = 20.0
"""An answer that takes longer is an error."""
MOST_CONNECTIONS = 1024
"""In an open loop: who comes while all of them are taken waits, and it counts."""


@dataclass
class Fates:
    """What became of each request so far."""

    latency_s: list[float] = field(default_factory=list)
    fates: list[str] = field(default_factory=list)

    def add(self, latency_s: float, fate: str) -> None:
        """One more."""
        self.latency_s.append(latency_s)
        self.fates.append(fate)


async def run_open(
    target: Target, requests: Sequence[bytes], order: np.ndarray, times: np.ndarray
) -> tuple[Fates, Tally]:
    """Send `requests[order[i]]` at `times[i]` seconds from now, whatever happened to the others."""
    fates = Fates()
    idle: list[Connection] = []
    room = asyncio.Semaphore(MOST_CONNECTIONS)

    async def send(at: float, request: bytes) -> None:
        async with room:
            connection, fate = await _ask(target, idle.pop() if idle else None, request)
            fates.add(time.perf_counter() - at, fate)
            if connection is not None:
                idle.append(connection)

    cpu, began = time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as sent:
        for offset, which in zip(times.tolist(), order.tolist(), strict=True):
            due = began + offset
            # a loop that is behind sends at once
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            sent.create_task(send(due, requests[which]))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    for connection in idle:
        connection.close()
    return fates, count_load(fates.latency_s, fates.fates, seconds, cpu)


async def run_closed(
    target: Target,
    requests: Sequence[bytes],
    order: np.ndarray,
    connections: int,
    seconds: float,
) -> tuple[Fates, Tally]:
    """So many connections, each with a request on its way, for so long.

    Args:
        order: what is asked, place after place, over and over.
    """
    fates = Fates()
    which = order.tolist()
    sent = 0
    cpu, began = time.process_time(), time.perf_counter()

    async def keep_asking() -> None:
        nonlocal sent
        connection: Connection | None = None
        while (at := time.perf_counter()) < began + seconds:
            request = requests[which[sent % len(which)]]
            sent += 1
            connection, fate = await _ask(target, connection, request)
            fates.add(time.perf_counter() - at, fate)
            if connection is None:
                await asyncio.sleep(0.05)  # a service that is gone is not asked in a frenzy
        if connection is not None:
            connection.close()

    await asyncio.gather(*(keep_asking() for _ in range(connections)))
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    return fates, count_load(fates.latency_s, fates.fates, took, cpu)


async def _ask(
    target: Target, connection: Connection | None, request: bytes
) -> tuple[Connection | None, str]:
    """The connection, if it can be used once more, and what became of the request."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            if connection is None or not connection.open:
                connection = await connect(target)
            status, _ = await connection.ask(request)
    except TimeoutError:
        fate = "timeout"
    except OSError as error:
        fate = f"connection: {type(error).__name__}"
    else:
        return connection if connection.open else None, OK if status == 200 else f"status {status}"
    if connection is not None:
        connection.close()
    return None, fate
