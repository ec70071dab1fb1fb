"""The plant of a run on attributes: client actors, and no server, for nothing is behind a cut.

To the driver it has the verbs of `Plant`. Clients put down what is private, the driver what is a
group's or everybody's. It does not know how updates are mixed.

Shapes: C clients, P sent numbers of one client.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fellray.actors.attribute_client import COMMON, PRIVATE, AttributeClient, name_values
from fellray.actors.attribute_world import AttributeWorld
from fellray.actors.holders import Holders
from fellray.actors.pool import InlinePool, Pool, RayPool, Shared, check_places
from fellray.platform.aggregation import Plan, Reports, describe
from fellray.platform.answers import read_updates
from fellray.platform.attribute_model import Backbone
from fellray.platform.click_score import ClickScore
from fellray.platform.clicks import VALID
from fellray.platform.config import RunConfig
from fellray.platform.fedpa import GROUP
from fellray.platform.manifest import Staged
from fellray.platform.places import read_demands
from fellray.platform.rounds import EVERYONE, Rounds
from fellray.platform.seating import deal


class AttributePlant(Holders):
    """Holders of adapters, as one. Make it with `on_ray` or `inline`."""

    _client: type[AttributeClient] = AttributeClient
    """What becomes actors."""

    def __init__(self, config: RunConfig, world: AttributeWorld, rounds: Rounds, clients: Pool):
        super().__init__(config, world.clients, world.sizes, rounds, clients)
        self._world = world
        self._layout = world.layout
        self._place = {client: i for i, client in enumerate(world.clients)}

    @classmethod
    def inline(cls, config: RunConfig, world: AttributeWorld, rounds: Rounds) -> Self:
        """Everything in this process: for tests and debugging; the same numbers."""
        args = _client_args(config, world, rounds, lambda name, value: value)
        return cls(config, world, rounds, InlinePool(cls._client, args))

    @classmethod
    def on_ray(cls, config: RunConfig, world: AttributeWorld, rounds: Rounds) -> Self:
        """Real actors on the Ray that this process is connected to.

        Raises:
            FellrayError: not all actors find a place.
        """
        events: list[str] = []
        wait_s = config.cluster.wait_for_nodes_s
        args = _client_args(config, world, rounds, Shared)
        _, demand = read_demands(config, len(args))
        if not wait_s:
            check_places([demand])
        pool = RayPool(cls._client, args, demand, events.append, wait_s)
        plant = cls(config, world, rounds, pool)
        plant._events = events
        return plant

    def stage_start(self) -> list[Staged]:
        """Round 0: the start that all clients and groups share, written once."""
        private, groups, common = self._layout.start(self._config.seed, self._world.backbone)
        tensors = {PRIVATE: private[None], COMMON: common[None]}
        tensors |= {name_values(attribute): values[None] for attribute, values in groups.items()}
        return self._expect(0, [self._rounds.stage(0, "start", (EVERYONE,), tensors)])

    def fit(self, round: int, clients: Sequence[str]) -> Reports:
        """Local training of those who take part, and what they report."""
        began = time.perf_counter()
        updates = self._clients.map("fit", self._seating.each(round), self._seating.split(clients))
        told = read_updates(updates)
        self._events += told.name_refused(round)
        whole = torch.from_numpy(np.concatenate([update.theta_SP for update in updates]))
        theta, accepted = told.select(whole), told.accepted
        blocks = self._layout.blocks()
        meta = describe(
            round,
            accepted,
            [told.losses[c] for c in accepted],
            [told.samples[c] for c in accepted],
            theta,
            theta,
            (),
            blocks,
            self._number_groups(accepted),
        )
        seconds, counted = time.perf_counter() - began, sum(told.samples.values())
        return Reports(meta, theta, told.refused, told.losses, counted, seconds, (), blocks)

    def install(self, reports: Reports, plan: Plan, mixed_CP: Tensor) -> list[Staged]:
        """Put down every group's copy and everybody's; clients put down what is their own.

        All members of a group have one row of the mixture, and so have all clients of a block that
        is everybody's: the first one's is taken. A group none of whose members took part keeps what
        it has.

        Raises:
            StaleLease: an actor lost what it trained: see `replayed`.
        """
        round, accepted = reports.meta.round, reports.meta.clients
        asked = self._clients.ask(
            "install", self._seating.each(round), self._seating.split(accepted)
        )
        files: list[Staged] = []
        if accepted:
            files += self._stage_groups(round, accepted, reports.blocks, mixed_CP)
            files += self._stage_common(round, reports.blocks, mixed_CP[0])
        return self._expect(round, [*files, *(one for few in asked() for one in few)])

    def evaluate(self, round: int, split: int) -> dict[str, ClickScore]:
        """Each actor's score of its clients at a round's state (split 1 validation, 2 test)."""
        at, files = self._pending
        answers = self._clients.map(
            "evaluate",
            self._seating.each(round),
            self._seating.each(split),
            self._seating.split(self.learners),
            self._seating.each(files if at == round else None),
        )
        return {actor: score for answer in answers for actor, score in answer.items()}

    def validate(self, round: int) -> dict[str, ClickScore] | None:
        """Validation scores, in the rounds that are due."""
        rule, last = self._config.evaluation, self._config.train.rounds
        return self.evaluate(round, VALID) if round % rule.every == 0 or round == last else None

    def measure_adapters(self, round: int) -> dict[str, float]:
        """The largest norm of any client's adapter factors, by `user.A` and the like."""
        told = self._clients.map(
            "measure_adapters", self._seating.each(round), self._seating.split(self.learners)
        )
        return {name: max(norms[name] for norms in told) for name in told[0]}

    def hash_shared(self, round: int) -> str:
        """SHA-256 over everybody's and all groups' copies at a round."""
        digest = hashlib.sha256(
            self._rounds.load(round, [EVERYONE], [COMMON])[COMMON].numpy().tobytes()
        )
        for attribute, names in self._world.groups.items():
            tensor = name_values(attribute)
            values = self._rounds.load(round, sorted(set(names)), [tensor])[tensor]
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def _number_groups(self, clients: Sequence[str]) -> dict[str, Tensor]:
        places = [self._place[client] for client in clients]
        return {
            attribute: torch.from_numpy(np.unique(names, return_inverse=True)[1][places])
            for attribute, names in self._world.groups.items()
        }

    def _stage_groups(
        self, round: int, clients: Sequence[str], blocks: Mapping[str, slice], mixed_CP: Tensor
    ) -> list[Staged]:
        files: list[Staged] = []
        for attribute, names in self._world.groups.items():
            if (columns := blocks.get(GROUP + attribute)) is None:
                continue
            present = np.array([names[self._place[client]] for client in clients])
            found, first = np.unique(present, return_index=True)
            tensors = {name_values(attribute): mixed_CP[first, columns]}
            holder = f"groups-{len(files):03d}"
            files.append(self._rounds.stage(round, holder, found.tolist(), tensors))
        return files

    def _stage_common(
        self, round: int, blocks: Mapping[str, slice], mixed_P: Tensor
    ) -> list[Staged]:
        if not blocks.keys() & {"gate", "output"}:
            return []
        common = self._rounds.load(round - 1, [EVERYONE], [COMMON])[COMMON].clone()
        output = self._layout.common[-1].size
        for name, part in (("gate", common[0, :-output]), ("output", common[0, -output:])):
            if name in blocks:
                part.copy_(mixed_P[blocks[name]])
        return [self._rounds.stage(round, "everyone", (EVERYONE,), {COMMON: common})]

    def _expect(self, round: int, staged: list[Staged]) -> list[Staged]:
        self._pending = (round, tuple(staged))
        self._rounds.expect(round, staged)
        return staged


def _client_args(
    config: RunConfig,
    world: AttributeWorld,
    rounds: Rounds,
    share: Callable[[str, Any], Any],
) -> list[tuple[Any, ...]]:
    """Constructor arguments of every client actor; the frozen backbone is shared once per node."""
    # workers may stand in another folder than the driver
    here = config.data.model_copy(update={"path": config.data.path.absolute()})
    config = config.model_copy(update={"data": here})
    shared: Backbone = share(f"backbone {world.data_sha256}", world.backbone)
    bounds = [0, *np.cumsum([len(h) for h in deal(world.clients, config.clients.together)])]
    return [
        (
            config,
            i,
            int(first),
            int(last),
            shared,
            {a: names[first:last] for a, names in world.groups.items()},
            rounds,
        )
        for i, (first, last) in enumerate(pairwise(bounds))
    ]
