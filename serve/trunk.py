"""The trunk as a service: activations in, hidden states out, batches of whoever waits.

Plain torch, no training. It sees no tokens, titles or histories. It must not know Ray.
"""

import asyncio
from collections.abc import Collection, Sequence

import numpy as np
import torch

from fellray.platform.allocator import keep_freed_memory
from fellray.platform.batcher import Batcher
from fellray.platform.config import RunConfig
from fellray.platform.device import choose_device
from fellray.platform.encoder import load_backbone
from fellray.platform.errors import FellrayError
from fellray.platform.host import TrunkHost
from fellray.platform.messages import Activation, StaleLease
from fellray.platform.run import Run, read_run
from fellray.platform.split import plan_cut
from fellray.platform.trunk import TorchEngine, build_trunk
from fellray.serve.args import Args
from fellray.serve.blends import Blends


class Trunk:
    """The trunk of one run, at whatever committed round a message names."""

    def __init__(self, args: Args, learners: Collection[str]):
        """Args: learners: ids of everyone who trains.

        Raises:
            FellrayError: no run is there, or its encoder cannot be loaded.
        """
        run = read_run(args.run)
        self._kept, self._rows = args.adapters, args.rows
        self._batcher = Batcher(run.config.server.max_tokens)
        # on the thread that will run it: thread counts belong to a thread
        self._rounds = Blends(run.storage, learners)
        self._host = self._batcher.call(make_host, run, args, self._rounds).result()

    async def forward(self, activation: Activation) -> np.ndarray:
        """Hidden states at the upper cut [L, d]; merged with whatever else waits.

        Raises:
            FellrayError: a page of the round is gone or damaged, or a client is not the run's.
        """
        future = self._batcher.submit(self._forward, activation, activation.num_tokens)
        output: np.ndarray = await asyncio.wrap_future(future)
        return output

    async def ready(self) -> bool:
        """True: whoever hears it has found a trunk that is made."""
        return True

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._batcher.close()

    def _forward(self, activations: Sequence[Activation]) -> list[np.ndarray | Exception]:
        """Round by round, as many at a time as there are rows, and room for adapters."""
        order = sorted(range(len(activations)), key=lambda at: activations[at].round)
        answers: dict[int, np.ndarray | Exception] = {}
        few: list[int] = []
        clients: set[str] = set()
        rows = 0
        for at in order:
            asked, more = activations[at].clients, len(activations[at].lengths_N)
            full = rows + more > self._rows or len(clients.union(asked)) > self._kept
            if few and full:
                answers |= self._pass(activations, few)
                few, clients, rows = [], set(), 0
            few.append(at)
            clients.update(asked)
            rows += more
        answers |= self._pass(activations, few)
        return [answers[at] for at in range(len(activations))]

    def _pass(
        self, activations: Sequence[Activation], few: Sequence[int]
    ) -> dict[int, np.ndarray | Exception]:
        """Together; where that fails, each on its own."""
        try:
            return dict(zip(few, self._host.forward([activations[at] for at in few]), strict=True))
        except (FellrayError, StaleLease) as error:
            self._rounds.look_again()  # the run may have decided on a damaged file
            if len(few) == 1:
                return {few[0]: error}
        alone: dict[int, np.ndarray | Exception] = {}
        for at in few:
            alone |= self._pass(activations, [at])
        return alone


def make_host(run: Run, args: Args, rounds: Blends) -> TrunkHost:
    """The host of a run's trunk, with the threads of the application, for whoever calls it.

    Raises:
        FellrayError: the encoder cannot be loaded.
    """
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config = plain_config(run.config)
    backbone = load_backbone(config.model.name)
    device = choose_device(args.trunk_gpus > 0)
    part = backbone.select(plan_cut(backbone, config.model).prefixes("trunk"))
    trunk, sites = build_trunk(part, config, device)
    engine = TorchEngine(trunk, config)
    return TrunkHost(
        config,
        rounds,
        sites,
        engine,
        rounds,
        device,
        own=run.own(),
        kept=args.adapters,
        trains=False,
    )


def plain_config(config: RunConfig) -> RunConfig:
    """The run's config for those who do not train: moments are not read."""
    return config.model_copy(update={"train": config.train.model_copy(update={"moments": "reset"})})
