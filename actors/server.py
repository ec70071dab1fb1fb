"""The server: the trunk's host behind a queue that merges whoever waits.

An async actor with exactly one engine thread; calls go client to server only. It sees activations
and gradients, never tokens or labels.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from fellray.actors.telemetry import ServerTelemetry
from fellray.platform.allocator import give_back_freed_memory, keep_freed_memory
from fellray.platform.batcher import Batcher
from fellray.platform.config import RunConfig
from fellray.platform.device import choose_device
from fellray.platform.encoder import Backbone
from fellray.platform.host import TrunkHost
from fellray.platform.manifest import Staged
from fellray.platform.messages import Activation, Continuation, Gradient, Installation, Lease
from fellray.platform.own import ALIKE, Own
from fellray.platform.rounds import Rounds
from fellray.platform.slots import WRITTEN
from fellray.platform.trunk import Engine, TorchEngine, build_trunk


def make_host(
    config: RunConfig,
    learners: Sequence[str],
    backbone: Backbone,
    rounds: Rounds,
    index: int = 0,
    own: Own = ALIKE,
) -> TrunkHost:
    """The trunk with the engine that the config names."""
    torch.set_num_threads(config.server.threads)
    keep_freed_memory()
    device = choose_device(config.server.gpus > 0)
    trunk, sites = build_trunk(backbone, config, device)
    engine: Engine
    if config.server.engine == "deepspeed":
        from fellray.actors.engine import DeepSpeedEngine

        engine = DeepSpeedEngine(trunk, config)
    else:
        engine = TorchEngine(trunk, config)
    return TrunkHost(config, learners, sites, engine, rounds, device, index, own)


class Server:
    """A plain class: `Pool` makes it an actor."""

    def __init__(
        self,
        config: RunConfig,
        learners: Sequence[str],
        backbone: Backbone,
        rounds: Rounds,
        index: int = 0,
        own: Own = ALIKE,
    ):
        """Args: index: which server of the run's."""
        self._telemetry = ServerTelemetry(config.name)
        self._batcher = Batcher(config.server.max_tokens, self._telemetry.count)
        # made on the thread that will run it: gradients and thread counts belong to a thread
        self._host = self._batcher.call(
            make_host, config, learners, backbone, rounds, index, own
        ).result()

    async def begin(
        self, run: str, round: int, clients: tuple[str, ...], twin: bool = False
    ) -> Lease:
        """See `TrunkHost.begin`."""
        lease: Lease = await self._call(self._host.begin, run, round, clients, twin)
        self._telemetry.begin(round, clients)
        return lease

    async def forward(self, activation: Activation) -> np.ndarray:
        """See `Remote.forward`; merged with whatever else waits."""
        future = self._batcher.submit(self._host.forward, activation, activation.num_tokens)
        output: np.ndarray = await asyncio.wrap_future(future)
        return output

    async def backward(self, activation: Activation, gradient: Gradient) -> np.ndarray:
        """See `Remote.backward`; merged with whatever else waits."""
        size = activation.num_tokens
        future = self._batcher.submit(self._host.backward, (activation, gradient), size)
        down: np.ndarray = await asyncio.wrap_future(future)
        return down

    async def extend(self, continuation: Continuation) -> np.ndarray:
        """See `Remote.extend`; merged with whatever else waits."""
        size = len(continuation.activation.h_Ld)
        future = self._batcher.submit(self._host.extend, continuation, size)
        output: np.ndarray = await asyncio.wrap_future(future)
        return output

    async def report(
        self, lives: Collection[str], clients: Sequence[str], shared: bool
    ) -> tuple[list[bool], np.ndarray]:
        """See `TrunkHost.report`. Training is over: what only the steps of many needed goes."""
        if len(clients) > WRITTEN:
            await self._call(give_back_freed_memory)
        call = self._call(self._host.report, lives, clients, shared)
        report: tuple[list[bool], np.ndarray] = await call
        return report

    async def shared_gradient(self, round: int, clients: Sequence[str]) -> np.ndarray:
        """See `TrunkHost.shared_gradient`."""
        gradient: np.ndarray = await self._call(self._host.shared_gradient, round, clients)
        return gradient

    async def install(
        self,
        installation: Installation,
        shared_P: np.ndarray | None = None,
        stages_shared: bool = True,
    ) -> tuple[Staged, ...]:
        """See `TrunkHost.install`."""
        staged: tuple[Staged, ...] = await self._call(
            self._host.install, installation, shared_P, stages_shared
        )
        return staged

    async def expect(self, round: int, staged: Sequence[Staged]) -> None:
        """See `TrunkHost.expect`."""
        await self._call(self._host.expect, round, staged)

    async def stage_start(self) -> tuple[Staged, ...]:
        """See `TrunkHost.stage_start`."""
        staged: tuple[Staged, ...] = await self._call(self._host.stage_start)
        return staged

    async def forget(self) -> None:
        """See `TrunkHost.forget`."""
        await self._call(self._host.forget)

    async def batch_sizes(self) -> list[int]:
        """Requests in each batch so far."""
        return list(self._batcher.sizes)

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.wrap_future(self._batcher.call(function, *args))
