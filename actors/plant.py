"""The plant: one server, the client actors, and a round that happens wholly or not at all.

To the driver it is one thing with verbs: `fit`, `install`, `evaluate`. Where the actors are, and
what becomes of one that dies, is decided below it. It does not know how updates are mixed.

Shapes: C learners, P sent parameters of one learner.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fellray.actors.client import Client
from fellray.actors.pool import Demand, InlinePool, Pool, RayPool, Shared, check_places
from fellray.actors.remote import RayRemote
from fellray.actors.server import Server, make_host
from fellray.actors.world import World
from fellray.platform.aggregation import Reports, describe
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.faults import Stop, decide
from fellray.platform.host import InProcess
from fellray.platform.manifest import Staged
from fellray.platform.messages import Installation, LedgerRow, StaleLease
from fellray.platform.metrics import Score
from fellray.platform.rounds import Rounds
from fellray.platform.span import Remote
from fellray.platform.split import plan_cut

Answer = TypeVar("Answer")


def deal(learners: Sequence[str], per_actor: int) -> list[tuple[str, ...]]:
    """Which learners share an actor: neighbours by id."""
    return [tuple(learners[at : at + per_actor]) for at in range(0, len(learners), per_actor)]


class Plant:
    """Holders of adapters, as one. Make it with `on_ray` or `inline`."""

    def __init__(
        self, config: RunConfig, world: World, rounds: Rounds, servers: Pool, clients: Pool
    ):
        self._config = config
        self._learners = tuple(sorted(world.seats))
        self._rounds = rounds
        self._servers = servers
        self._clients = clients
        self._hosts = deal(self._learners, config.clients.per_actor)
        self._known: tuple[int, Tensor] | None = None
        sites = plan_cut(world.backbone, config.model).sites
        self._client_columns = (
            sum(s.num_parameters(config.model.lora.r) for s in sites["bottom"] + sites["top"])
            if config.train.share == "all"
            else 0
        )
        self._events: list[str] = []

    @classmethod
    def inline(cls, config: RunConfig, world: World, rounds: Rounds) -> "Plant":
        """Everything in this process: for tests and debugging; the same numbers."""
        learners = tuple(sorted(world.seats))
        host = make_host(config, learners, world.trunk_side(config), rounds)
        args = _client_args(config, world, InProcess(host), rounds, lambda name, value: value)
        clients = InlinePool(Client, args)
        return cls(config, world, rounds, InlinePool(lambda: host, [()]), clients)

    @classmethod
    def on_ray(cls, config: RunConfig, world: World, rounds: Rounds) -> "Plant":
        """Real actors on the Ray that this process is connected to.

        Raises:
            FellrayError: not all actors find a place.
        """
        events: list[str] = []
        learners = tuple(sorted(world.seats))
        share = config.clients.gpu_denominator
        count = len(deal(learners, config.clients.per_actor))
        client = Demand("client", count, config.clients.cpus, 1 / share if share else 0.0)
        server = Demand("server", 1, config.server.cpus, config.server.gpus)
        check_places([server, client], config.cluster.wait_for_nodes_s)
        frozen = Shared(f"trunk {world.key(config)}", world.trunk_side(config))
        servers = RayPool(Server, [(config, learners, frozen, rounds)], server, events.append)
        try:
            remote = RayRemote(servers.handles[0])
            args = _client_args(config, world, remote, rounds, Shared)
            clients = RayPool(Client, args, client, events.append)
        except BaseException:
            servers.close()
            raise
        plant = cls(config, world, rounds, servers, clients)
        plant._events = events
        return plant

    def stage_start(self) -> list[Staged]:
        """Round 0 at every holder: the start that all clients share."""
        return self._staged(self._clients.map("stage_start"), self._servers.map("stage_start"))

    def fit(self, round: int) -> Reports:
        """Local split training of every learner.

        Raises:
            StaleLease: the server was lost after some had finished: see `replayed`.
        """
        began = time.perf_counter()
        updates = self._clients.map("fit", self._each(round))
        learners = [c for update in updates for c in update.clients]
        lives = {update.lease.server for update in updates}
        (finite,) = self._servers.map("are_finite", [lives], [learners])
        parts = [np.concatenate([update.theta_SP for update in updates])]
        if self._config.train.share != "none":
            parts += self._servers.map("theta", [lives], [learners])
        theta = torch.from_numpy(np.concatenate(parts, axis=1))
        refused = {c: why for update in updates for c, why in update.refused.items()}
        for learner, whole in zip(learners, finite, strict=True):
            if not whole:
                refused.setdefault(learner, "the trunk's update holds a NaN or an infinity")
        self._events += [f"round {round}: {c} refused: {why}" for c, why in sorted(refused.items())]
        losses = {c: loss for u in updates for c, loss in zip(u.clients, u.losses, strict=True)}
        samples = {c: n for u in updates for c, n in zip(u.clients, u.samples, strict=True)}
        accepted = [c for c in self._learners if c not in refused]
        rows = torch.tensor([learners.index(c) for c in accepted], dtype=torch.int64)
        places = torch.tensor([self._learners.index(c) for c in accepted], dtype=torch.int64)
        theta = theta[rows]
        meta = describe(
            round,
            accepted,
            [losses[c] for c in accepted],
            [samples[c] for c in accepted],
            theta,
            self._sent_at(round - 1)[places],
            self._config.method.compares(),
        )
        return Reports(
            meta, theta, refused, losses, sum(samples.values()), time.perf_counter() - began
        )

    def install(self, reports: Reports, mixed_CP: Tensor) -> list[Staged]:
        """Give every accepted learner its row of the mixture, the others their round's start.

        Raises:
            StaleLease: a holder lost what it trained: see `replayed`.
        """
        round = reports.meta.round
        sent = self._sent_at(round - 1).clone()
        places = [self._learners.index(c) for c in reports.meta.clients]
        sent[torch.tensor(places, dtype=torch.int64)] = mixed_CP
        width = self._client_columns
        refused = tuple(sorted(reports.refused))
        row = {c: i for i, c in enumerate(self._learners)}
        installations = [
            Installation(
                round,
                host,
                sent[[row[c] for c in host], :width].numpy(),
                tuple(c for c in host if c in refused),
            )
            for host in self._hosts
        ]
        client_files = self._clients.map("install", installations)
        trunk = Installation(round, self._learners, sent[:, width:].numpy(), refused)
        server_files = self._servers.map("install", [trunk])
        self._known = (round, sent)
        return self._staged(client_files, server_files)

    def evaluate(self, round: int, split: int, max_users: int | None = None) -> dict[str, Score]:
        """Each client's scores at a round's state (split 1 validation, 2 test)."""
        answers = self._clients.map(
            "evaluate", self._each(round), self._each(split), self._each(max_users)
        )
        return {client: score for answer in answers for client, score in sorted(answer.items())}

    def validate(self, round: int) -> dict[str, Score] | None:
        """Validation scores, in the rounds that are due."""
        rule, last = self._config.evaluation, self._config.train.rounds
        if round % rule.every and round != last:
            return None
        return self.evaluate(round, 1, rule.max_users)

    def evaluate_baselines(self, split: int) -> dict[str, dict[str, Score]]:
        """The rows that need no model: name -> client -> scores."""
        answers = self._clients.map("evaluate_baselines", self._each(split))
        names = answers[0]
        return {n: {c: s for a in answers for c, s in sorted(a[n].items())} for n in names}

    def close_ledger(self) -> list[LedgerRow]:
        """What all clients exchanged since the last call, by client and kind."""
        rows = [row for answer in self._clients.map("close_ledger") for row in answer]
        return sorted(rows, key=lambda row: (row.client, row.kind))

    def take_events(self) -> list[str]:
        """What was lost, begun again or refused since the last call, in words."""
        events = list(self._events)
        self._events.clear()
        return events

    def replayed(self, work: Callable[..., Answer], *args: Any) -> Answer:
        """Run a round; if a holder was lost in it, everyone goes back to its start and again."""
        tries = 1
        while True:
            try:
                return work(self, *args)
            except StaleLease as lost:
                reason = str(lost)
            decision = decide(tries, False, reason)
            if isinstance(decision, Stop):
                raise FellrayError(f"{decision.reason}; `fellray train` resumes the run")
            self._events.append(f"the round was begun again: {reason}")
            time.sleep(decision.pause_s)
            self._clients.map("forget")
            self._servers.map("forget")
            self._known = None
            tries += 1

    def close(self) -> None:
        """End all actors."""
        self._clients.close()
        self._servers.close()

    def __enter__(self) -> "Plant":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sent_at(self, round: int) -> Tensor:
        """Everybody's sent weights at a committed or just installed round [C, P]."""
        if self._known is None or self._known[0] != round:
            names = {"all": ["client.values", "trunk.values"], "trunk_only": ["trunk.values"]}
            wanted = names.get(self._config.train.share, [])
            loaded = self._rounds.load(round, self._learners, wanted) if wanted else {}
            empty = torch.empty(len(self._learners), 0)
            self._known = (round, torch.cat([empty, *(loaded[n] for n in wanted)], dim=1))
        return self._known[1]

    def _each(self, value: Any) -> list[Any]:
        return [value] * len(self._hosts)

    @staticmethod
    def _staged(*answers: Sequence[tuple[Staged, ...]]) -> list[Staged]:
        return [staged for answer in answers for files in answer for staged in files]


def _client_args(
    config: RunConfig,
    world: World,
    remote: Remote,
    rounds: Rounds,
    share: Callable[[str, Any], Any],
) -> list[tuple[Any, ...]]:
    """Constructor arguments of every client actor; what is equal for all is shared once."""
    # workers may stand in another folder than the driver
    here = config.data.model_copy(update={"path": config.data.path.absolute()})
    config = config.model_copy(update={"data": here})
    backbone = share(f"client {world.key(config)}", world.client_side(config))
    catalogue = share(f"catalogue {world.key(config)}", world.catalogue)
    return [
        (config, i, {c: world.seats[c] for c in host}, backbone, catalogue, remote, rounds)
        for i, host in enumerate(deal(sorted(world.seats), config.clients.per_actor))
    ]
