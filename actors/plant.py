"""The plant: servers, client actors, and a round that happens wholly or not at all.

To the driver it is one thing with verbs: `fit`, `install`, `evaluate`. Where the actors are, and
what becomes of one that dies, is decided below it. It does not know how updates are mixed.

Shapes: C learners, P sent parameters of one learner.
"""

import time
from collections.abc import Sequence
from typing import Self

import numpy as np
from torch import Tensor

from fellray.actors.client import Client
from fellray.actors.client_args import make_client_args, share_names, share_own
from fellray.actors.holders import Holders
from fellray.actors.pool import InlinePool, Pool, RayPool, Shared, check_places
from fellray.actors.remote import RayRemote
from fellray.actors.server import Server, make_host
from fellray.actors.servers import Servers, check_servers
from fellray.actors.world import World
from fellray.platform.aggregation import Plan, Reports, describe
from fellray.platform.allotment import Allotment
from fellray.platform.answers import read_updates, take_on_time
from fellray.platform.client_groups import number_groups
from fellray.platform.config import RunConfig
from fellray.platform.in_process import InProcess
from fellray.platform.manifest import Staged
from fellray.platform.messages import Damaged
from fellray.platform.metrics import Score
from fellray.platform.places import read_demands
from fellray.platform.rounds import Rounds
from fellray.platform.seating import deal
from fellray.platform.sent_pages import SentPages
from fellray.platform.sent_row import SentRow
from fellray.platform.split import plan_cut


class Plant(Holders):
    """Holders of adapters, as one. Make it with `on_ray` or `inline`."""

    _server: type[Server] = Server
    _client: type[Client] = Client
    """What becomes actors; a kind of plant that measures has its own."""

    def __init__(
        self, config: RunConfig, world: World, rounds: Rounds, servers: Pool, clients: Pool
    ):
        learners = tuple(sorted(world.seats))
        sizes = np.array([world.sizes[c] for c in learners])
        super().__init__(config, learners, sizes, rounds, clients)
        self._servers = Servers(
            servers,
            config.server.count,
            self._seating.of,
            self._seating.num_actors,
            lambda n: self._events.append(n),
        )
        cut = plan_cut(world.backbone, config.model)
        self._row = SentRow(config, cut, world.own)
        self._groups = world.groups
        self._pages = SentPages(config, cut, self._row, rounds)
        self._start_restored = False

    @classmethod
    def inline(cls, config: RunConfig, world: World, rounds: Rounds) -> "Plant":
        """Everything in this process: for tests and debugging; the same numbers."""
        config = world.own.settle(config)
        learners, trunk = tuple(sorted(world.seats)), world.trunk_side(config)
        check_servers(config.server.count, len(deal(learners, config.clients.together)))
        servers = InlinePool(
            make_host,
            [(config, learners, trunk, rounds, i, world.own) for i in range(config.server.count)],
        )
        remote = InProcess(*servers.members)
        args = make_client_args(config, world, remote, rounds, lambda name, value: value)
        return cls(config, world, rounds, servers, InlinePool(Client, args))

    @classmethod
    def on_ray(cls, config: RunConfig, world: World, rounds: Rounds) -> Self:
        """Real actors on the Ray that this process is connected to.

        Raises:
            FellrayError: not all actors find a place.
        """
        events: list[str] = []
        config = world.own.settle(config)
        learners = tuple(sorted(world.seats))
        count = len(deal(learners, config.clients.together))
        check_servers(config.server.count, count)
        server, client = read_demands(config, count)
        wait_s = config.cluster.wait_for_nodes_s
        if not wait_s:
            check_places([server, client])
        frozen = Shared(f"trunk {world.key(config)}", world.trunk_side(config))
        everyone = share_names(Shared, learners)
        own = share_own(Shared, world.own)
        rows = [(config, everyone, frozen, rounds, i, own) for i in range(config.server.count)]
        servers = RayPool(cls._server, rows, server, events.append, wait_s)
        try:
            remote = RayRemote(servers.handles)
            args = make_client_args(config, world, remote, rounds, Shared)
            clients = RayPool(cls._client, args, client, events.append, wait_s)
        except BaseException:
            servers.close()
            raise
        plant = cls(config, world, rounds, servers, clients)
        plant._events = events
        return plant

    def stage_start(self) -> list[Staged]:
        """Round 0: the start that all clients share, written once, or one for each."""
        client_files = self._clients.map("stage_start")[:1]
        common = self._servers.stage_start()
        own = self._pages.stage_own_starts(self._learners)
        return self._expect(0, [*client_files, common, *own])

    def fit(self, round: int, clients: Sequence[str]) -> Reports:
        """Local split training of those who take part, and what they report.

        Raises:
            StaleLease: a server was lost: see `replayed`.
        """
        began = time.perf_counter()
        self._servers.place()
        rule = self._config.sampling
        answers = self._clients.map(
            "fit",
            self._seating.each(round),
            self._seating.split(clients),
            self._seating.each(rule.deadline_s),
            self._servers.of_actor,
        )
        updates, late = take_on_time(answers, clients, rule.per_round)
        if late:
            self._events.append(f"round {round}: {len(late)} of {len(clients)} were late")
        row, told = self._row, read_updates(updates)
        answered = self._servers.report(updates, row.client_width < row.width)
        theta = row.lay([update.theta_SP for update in updates])
        served = answered()
        row.join_(theta, [trunk for _, trunk in served], told.learners)
        usable = [is_usable for theirs, _ in served for is_usable in theirs]
        told.refuse(usable, "the trunk's update holds a NaN or an infinity")
        self._events += told.name_refused(round)
        # what Ray holds of the answers is as much again
        del answers, updates, answered, served
        theta, accepted = told.select(theta), told.accepted
        compared = self._config.method.compares()
        meta = describe(
            round,
            accepted,
            [told.losses[c] for c in accepted],
            [told.samples[c] for c in accepted],
            theta,
            self._pages.load_start(round, accepted) if "update" in compared and accepted else theta,
            compared,
            row.blocks,
            number_groups(self._groups, accepted),
            by_layer=self._config.method.compares_layers(),
            rank=self._config.model.lora.r,
        )
        seconds = time.perf_counter() - began
        counted = sum(told.samples.values())
        return Reports(meta, theta, told.refused, told.losses, counted, seconds, late, row.blocks)

    def install(self, reports: Reports, plan: Plan, mixed_CP: Tensor) -> list[Staged]:
        """Give every accepted learner its row of the mixture, the others their round's start.

        A row is cut to its learner's own rank, in place, and each side gets what it holds of that
        learner. A mixture that is everyone's stays whole: each learner cuts what it reads. Where
        only some blocks are everyone's, the driver writes them into the pages of all others.

        Raises:
            StaleLease: a holder lost what it trained: see `replayed`.
        """
        round, accepted = reports.meta.round, reports.meta.clients
        given = Allotment(
            self._config,
            self._row,
            self._pages,
            self._rounds,
            reports,
            plan,
            mixed_CP,
            self._learners,
            self._groups,
        )
        client_files = self._clients.ask(
            "install", [given.give(cs, False) for cs in self._seating.split(given.took_part)]
        )
        shared = self._config.server.shared_adapter
        server_files = self._servers.install(
            given.took_part,
            lambda clients: given.give(clients, True),
            self._servers.shared_gradient(round, accepted) if shared else None,
        )
        driver_files = given.stage()
        return self._expect(round, [*client_files(), *server_files(), *driver_files])

    def evaluate(self, round: int, split: int, max_users: int | None = None) -> dict[str, Score]:
        """Each client's scores at a round's state (split 1 validation, 2 test)."""
        at, files = self._pending
        staged = files if at == round else None
        if staged is not None:
            self._servers.expect(round, staged)
        answers = self._clients.map(
            "evaluate",
            self._seating.each(round),
            self._seating.each(split),
            self._seating.each(max_users),
            self._seating.split(self.learners),
            self._seating.each(staged),
            self._servers.of_actor,
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
        seated = self._seating.split(self.learners)
        answers = self._clients.map("evaluate_baselines", self._seating.each(split), seated)
        names = answers[0]
        return {n: {c: s for a in answers for c, s in sorted(a[n].items())} for n in names}

    def _forget(self) -> None:
        super()._forget()
        self._servers.forget()

    def _mend(self, damage: Damaged) -> list[str]:
        try:
            return super()._mend(damage)
        except Damaged as hopeless:
            if hopeless.round or self._start_restored:
                raise
        # the start follows from the seed: all can write it once more
        self._start_restored = True
        self._clients.map("stage_start")
        self._servers.stage_start()
        self._pages.stage_own_starts(self._learners)
        return [f"{damage.file} of round 0 was damaged: the start was made again"]

    def close(self) -> None:
        """End all actors."""
        super().close()
        self._servers.pool.close()

    def _expect(self, round: int, answers: Sequence[tuple[Staged, ...]]) -> list[Staged]:
        staged = tuple(one for files in answers for one in files)
        self._pending = (round, staged)
        return list(staged)
