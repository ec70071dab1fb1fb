"""The plant: servers, client actors, and a round that happens wholly or not at all.

To the driver it is one thing with verbs: `fit`, `install`, `evaluate`. Where the actors are, and
what becomes of one that dies, is decided below it. It does not know how updates are mixed.

Shapes: C learners, P sent parameters of one learner.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from fellray.actors.client import Client, deal
from fellray.actors.pool import Demand, InlinePool, Pool, RayPool, Shared, check_places
from fellray.actors.remote import RayRemote
from fellray.actors.server import Server, make_host
from fellray.actors.servers import Servers, check_servers
from fellray.actors.world import World
from fellray.platform.adapters import cut_, find_columns, name_blocks, start, views
from fellray.platform.aggregation import Plan, Reports, describe, name_layers, split_columns
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.faults import Stop, decide
from fellray.platform.handover import METHOD
from fellray.platform.host import InProcess
from fellray.platform.local import SERVER_CONTROL, advance_server_control
from fellray.platform.manifest import Staged
from fellray.platform.messages import Damaged, Installation, LedgerRow, StaleLease, Update
from fellray.platform.metrics import Score
from fellray.platform.middle import Middle
from fellray.platform.own import ALIKE, Own
from fellray.platform.privacy_config import NoPrivacy
from fellray.platform.rounds import EVERYONE, Rounds
from fellray.platform.sampling import Sampler
from fellray.platform.server_step import Snapshot, State
from fellray.platform.slabs import mix
from fellray.platform.slots import WRITTEN
from fellray.platform.span import Remote
from fellray.platform.split import plan_cut

Answer = TypeVar("Answer")


class Plant:
    """Holders of adapters, as one. Make it with `on_ray` or `inline`."""

    _server: type[Server] = Server
    _client: type[Client] = Client
    """What becomes actors; a kind of plant that measures has its own."""

    def __init__(
        self, config: RunConfig, world: World, rounds: Rounds, servers: Pool, clients: Pool
    ):
        self._config = config
        self._learners = tuple(sorted(world.seats))
        self._rounds = rounds
        self._clients = clients
        hosts = deal(self._learners, config.clients.together)
        self._num_hosts = len(hosts)
        self._host = {c: i for i, host in enumerate(hosts) for c in host}
        self._servers = Servers(
            servers, config.server.count, self._host, len(hosts), lambda n: self._events.append(n)
        )
        sizes = np.array([world.sizes[c] for c in self._learners])
        self._sampler = Sampler(config.sampling, config.seed, self._learners, sizes)
        self.learners = _choose(self._learners, config.evaluation.clients)
        """Those who are evaluated, sorted."""
        self._pending: tuple[int, tuple[Staged, ...]] = (-1, ())
        cut, lora = plan_cut(world.backbone, config.model), config.model.lora
        self._cut = cut
        self._own = world.own
        ends = cut.outer if config.train.share == "all" else []
        trunk = cut.sites["trunk"] if config.train.share != "none" else []
        self._middle = Middle(ends, lora.r)
        self._sent_sites = ends + (trunk if self._middle.empty else self._middle.without(trunk))
        self._client_columns, self._columns = (
            sum(site.num_parameters(lora.r) for site in own) for own in (ends, self._sent_sites)
        )
        self._blocks = name_blocks(self._sent_sites, lora.r)
        self._rule = config.method.local()
        self._sent = find_columns(name_blocks(ends, lora.r), config.method.sends)
        """The columns of a client's row that reach the driver; None: all."""
        self._frozen_P = self._freeze() if self._rule.freezes_a else None
        """Where A stands its frozen numbers, elsewhere NaN."""
        self._events: list[str] = []
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
        args = _client_args(config, world, remote, rounds, lambda name, value: value)
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
        share = config.clients.gpu_denominator
        count = len(deal(learners, config.clients.together))
        check_servers(config.server.count, count)
        client = Demand("client", count, config.clients.cpus, 1 / share if share else 0.0)
        server = Demand("server", config.server.count, config.server.cpus, config.server.gpus)
        wait_s = config.cluster.wait_for_nodes_s
        if not wait_s:
            check_places([server, client])
        frozen = Shared(f"trunk {world.key(config)}", world.trunk_side(config))
        everyone = _share_names(Shared, learners)
        own = _share_own(Shared, world.own)
        rows = [(config, everyone, frozen, rounds, i, own) for i in range(config.server.count)]
        servers = RayPool(cls._server, rows, server, events.append, wait_s)
        try:
            remote = RayRemote(servers.handles)
            args = _client_args(config, world, remote, rounds, Shared)
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
        return self._expect(0, [*client_files, common, *self._stage_own_starts()])

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
            self._each(round),
            self._seated(clients),
            self._each(rule.deadline_s),
            self._servers.of_actor,
        )
        updates, late = _on_time(answers, clients, rule.per_round)
        if late:
            self._events.append(f"round {round}: {len(late)} of {len(clients)} were late")
        learners = [c for update in updates for c in update.clients]
        width, whole = self._client_columns, np.empty((len(learners), self._columns), np.float32)
        answered = self._servers.report(updates, width < self._columns)
        reported = [update.theta_SP for update in updates]
        if self._sent is None:
            np.concatenate(reported, out=whole[:, :width])
        else:
            whole[:, :width] = 0.0 if self._frozen_P is None else self._frozen_P[:width]
            whole[:, self._sent.numpy()] = np.concatenate(reported)
        served = answered()
        theta, trunks = torch.from_numpy(whole), [trunk for _, trunk in served]
        if self._middle.empty:
            np.concatenate(trunks, out=whole[:, width:])
        else:
            held = torch.from_numpy(np.concatenate(trunks))
            self._middle.join_(theta, held, self._own.cuts_of(learners))
        refused = {c: why for update in updates for c, why in update.refused.items()}
        finite = [usable for their, _ in served for usable in their]
        for learner, usable in zip(learners, finite, strict=True):
            if not usable:
                refused.setdefault(learner, "the trunk's update holds a NaN or an infinity")
        self._events += [f"round {round}: {c} refused: {why}" for c, why in sorted(refused.items())]
        losses = {c: loss for u in updates for c, loss in zip(u.clients, u.losses, strict=True)}
        samples = {c: n for u in updates for c, n in zip(u.clients, u.samples, strict=True)}
        accepted = [c for c in learners if c not in refused]
        # what Ray holds of the answers is as much again
        del answers, updates, reported, answered, served, trunks
        if refused:
            theta = theta[[i for i, c in enumerate(learners) if c not in refused]]
        compared = self._config.method.compares()
        meta = describe(
            round,
            accepted,
            [losses[c] for c in accepted],
            [samples[c] for c in accepted],
            theta,
            self._start_of(round, accepted) if "update" in compared and accepted else theta,
            compared,
            tuple(self._blocks),
            layers=name_layers(self._blocks) if self._config.method.compares_layers() else {},
        )
        seconds = time.perf_counter() - began
        counted = sum(samples.values())
        return Reports(meta, theta, refused, losses, counted, seconds, late, self._blocks)

    def install(self, reports: Reports, plan: Plan, mixed_CP: Tensor) -> list[Staged]:
        """Give every accepted learner its row of the mixture, the others their round's start.

        A row is cut to its learner's own rank, in place, and each side gets what it holds of that
        learner. A mixture that is everyone's stays whole: each learner cuts what it reads. Where
        only some blocks are everyone's, the driver writes them into the pages of all others.

        Raises:
            StaleLease: a holder lost what it trained: see `replayed`.
        """
        round, accepted = reports.meta.round, reports.meta.clients
        parts = split_columns(plan, reports.blocks, self._columns) if len(accepted) else []
        everyones = [columns for part, columns in parts if part.common]
        common = 0 < len(parts) == len(everyones)
        self._check_private(reports, plan)
        mixed_CP, method_files = self._take_step(reports, plan, common, mixed_CP)
        refused = set(reports.refused)
        # who is refused has no row; any will do, nobody reads it
        row = {c: i for i, c in enumerate(accepted)} | dict.fromkeys(refused, 0)
        took_part = tuple(sorted(row))
        if self._frozen_P is not None:  # a mean of equal numbers may be another one
            mixed_CP = mixed_CP[:1] if common else mixed_CP
            mixed_CP = torch.where(self._frozen_P.isnan(), mixed_CP, self._frozen_P)
        theta_1P = mixed_CP[:1]
        if not common:
            theta_1P = theta_1P.clone()
            self._cut_(accepted, mixed_CP)
        sent = mixed_CP if len(accepted) else mixed_CP.new_zeros(1, mixed_CP.shape[1])
        control_1P = self._advance_control(reports, common)

        def installation(clients: Sequence[str], at_server: bool) -> Installation:
            rows = [0] if common else [row[c] for c in clients]
            cuts = None if common or self._middle.empty else self._own.cuts_of(clients)
            given = self._part(sent, rows, at_server, cuts)
            if not at_server and self._sent is not None:
                given = given[:, self._sent]
            if control_1P is not None:
                given = torch.cat([given, self._part(control_1P, [0], at_server, None)], 1)
            theta = given.numpy()
            if common:
                theta = np.broadcast_to(theta, (len(clients), theta.shape[1]))
            here = tuple(c for c in clients if c in refused)
            return Installation(round, tuple(clients), theta, here, common)

        client_files = self._clients.ask(
            "install", [installation(cs, False) for cs in self._seated(took_part)]
        )
        shared = self._config.server.shared_adapter
        server_files = self._servers.install(
            took_part,
            lambda clients: installation(clients, True),
            self._servers.shared_gradient(round, accepted) if shared else None,
        )
        if common:
            driver_files = [self._stage_rows(round, "everyone", [EVERYONE], theta_1P, control_1P)]
        else:
            driver_files = self._stage_others(round, accepted, everyones, theta_1P)
        files = [*client_files(), *server_files(), *driver_files, method_files]
        return self._expect(round, files)

    def sample(self, round: int) -> tuple[str, ...]:
        """Who is asked in a round."""
        return tuple(self._learners[i] for i in self._sampler.sample(round))

    def evaluate(self, round: int, split: int, max_users: int | None = None) -> dict[str, Score]:
        """Each client's scores at a round's state (split 1 validation, 2 test)."""
        at, files = self._pending
        staged = files if at == round else None
        if staged is not None:
            self._servers.expect(round, staged)
        answers = self._clients.map(
            "evaluate",
            self._each(round),
            self._each(split),
            self._each(max_users),
            self._seated(self.learners),
            self._each(staged),
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
        seated = self._seated(self.learners)
        answers = self._clients.map("evaluate_baselines", self._each(split), seated)
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
        """Run a round; if a holder was lost in it, everyone goes back to its start and again.

        So it is where a page is damaged, once it is decided who goes back to an earlier one.

        Raises:
            FellrayError: it was lost too often, or what is damaged cannot be replaced.
        """
        tries = 1
        while True:
            mended: list[str] = []
            try:
                return work(self, *args)
            except StaleLease as lost:
                reason = str(lost)
            except Damaged as damage:
                reason = str(damage)
                mended = self._mend(damage)
            self._events += mended
            if not mended:  # whoever decides finds new damage each time, so that it has an end
                decision = decide(tries, False, reason)
                if isinstance(decision, Stop):
                    raise FellrayError(f"{decision.reason}; `fellray train` resumes the run")
                self._events.append(f"the round was begun again: {reason}")
                time.sleep(decision.pause_s)
                tries += 1
            self._clients.map("forget")
            self._servers.forget()
            self._pending = (-1, ())

    def _mend(self, damage: Damaged) -> list[str]:
        """What was decided, in words; nothing where the file is whole by now."""
        try:
            return self._rounds.mend(damage)
        except Damaged as hopeless:
            if hopeless.round or self._start_restored:
                raise
        # the start follows from the seed: all can write it once more
        self._start_restored = True
        self._clients.map("stage_start")
        self._servers.stage_start()
        self._stage_own_starts()
        return [f"{damage.file} of round 0 was damaged: the start was made again"]

    def close(self) -> None:
        """End all actors."""
        self._clients.close()
        self._servers.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance_control(self, reports: Reports, common: bool) -> Tensor | None:
        """The servers' control variate after the round [1, P]; None where there is none, or nothing
        to move it.

        Raises:
            FellrayError: the method's plan is not one for everyone.
        """
        meta = reports.meta
        if not self._rule.controls or not meta.clients:
            return None
        if not common:
            raise FellrayError(
                "control variates are for a mixture that is everyone's: `plan` must answer "
                "Plan(..., common=True), or `local` a rule without controls"
            )
        train, some = self._config.train, meta.clients[:1]
        steps_C = (meta.samples_C / train.batch_size).ceil()
        weights_C = 1 / (steps_C * train.learning_rate)
        mean_1P = torch.empty(1, self._columns)
        mix((weights_C / weights_C.sum()).repeat(len(weights_C), 1), reports.theta_CP, mean_1P)
        before_1P, start_1P = (
            self._sent_at(meta.round - 1, some, kind) for kind in (SERVER_CONTROL, "values")
        )
        registered = len(self._learners)
        return advance_server_control(before_1P, start_1P, mean_1P, weights_C, registered)

    def _sent_at(self, round: int, clients: Sequence[str], kind: str | None = None) -> Tensor:
        """The clients' sent weights at a committed round [C, P], or what else is so long."""
        kind = kind or self._rule.sent
        names = [f"client.{kind}", f"trunk.{kind}"]
        wanted = {"all": names, "trunk_only": names[1:]}.get(self._config.train.share, [])
        if not wanted or not clients:
            return torch.empty(len(clients), 0)
        few, found = deal(clients, WRITTEN), torch.empty(0, 0)
        for at, some in enumerate(few):
            parts = list(self._rounds.load(round, some, wanted).values())
            if self._middle.empty:
                loaded = torch.cat(parts, dim=1)
            else:
                loaded = torch.empty(len(some), self._columns)
                loaded[:, : self._client_columns] = parts[0]
                self._middle.join_(loaded, parts[1], self._own.cuts_of(some))
            if not at:
                found = torch.empty(len(clients), loaded.shape[1])
            found[at * WRITTEN : at * WRITTEN + len(some)] = loaded
        self._cut_(clients, found)
        return found

    def _start_of(self, round: int, clients: Sequence[str]) -> Tensor:
        """What the clients' sent weights were at the start of a round [C, P]."""
        start_CP = self._sent_at(round - 1, clients)
        if self._sent is not None and self._frozen_P is None:
            stays_P = torch.ones(self._client_columns, dtype=torch.bool)
            stays_P[self._sent] = False
            start_CP[:, : self._client_columns][:, stays_P] = 0.0
        return start_CP

    def _take_step(
        self, reports: Reports, plan: Plan, common: bool, mixed_CP: Tensor
    ) -> tuple[Tensor, tuple[Staged, ...]]:
        """The rows after the method's own step, and its state as a file of the round."""
        round, accepted = reports.meta.round, reports.meta.clients
        if plan.step is None:
            return mixed_CP, ()
        state: State = {
            name.removeprefix(METHOD): self._rounds.load_shared(round - 1, name)
            for name in self._rounds.shared(round - 1)
            if name.startswith(METHOD)
        }
        if accepted:
            # everyone's page is of the largest rank, as the mixture
            start_RP = self._start_of(round, [EVERYONE] if common else accepted)
            rank, mixed_RP = self._config.model.lora.r, mixed_CP[: len(start_RP)]
            seen = Snapshot(start_RP, mixed_RP, reports.theta_CP, reports.blocks, rank)
            rows_RP, state = plan.step.take(seen, state)
            mixed_CP = rows_RP.expand(len(accepted), -1)
        if not state:
            return mixed_CP, ()
        tensors = {f"{METHOD}{name}": tensor for name, tensor in state.items()}
        return mixed_CP, (self._rounds.stage(round, "method", (), tensors),)

    def _check_private(self, reports: Reports, plan: Plan) -> None:
        """See that what clients keep is mixed with nobody's.

        Raises:
            ValueError: the plan mixes it.
        """
        if self._sent is None or self._frozen_P is not None:
            return
        matrices = {id(part.mixing_CC): part.mixing_CC for part in plan.blocks.values()}
        matrices[id(plan.mixing_CC)] = plan.mixing_CC
        eye = torch.eye(len(plan.mixing_CC), dtype=torch.float64)
        alone = {key for key, mixing_CC in matrices.items() if torch.equal(mixing_CC, eye)}
        for name in reports.blocks:
            mixing_CC = plan.blocks[name].mixing_CC if name in plan.blocks else plan.mixing_CC
            if id(mixing_CC) not in alone and not self._config.method.sends(name):
                raise ValueError(
                    f"clients do not send block {name!r}, and the plan mixes it; give it the "
                    "identity"
                )

    def _freeze(self) -> Tensor:
        """A row of what is sent [P]: A's frozen numbers, and NaN where B stands."""
        assert self._config.method.begins_alike(), "a frozen A is one for all"
        lora = self._config.model.lora
        frozen_P = start(self._sent_sites, lora, self._config.seed)
        for name, columns in self._blocks.items():
            if name.endswith(".lora_B"):
                frozen_P[columns] = torch.nan
        return frozen_P

    def _cut_(self, clients: Sequence[str], sent_CP: Tensor) -> None:
        """Leave each of the clients' sent rows what its own rank has, in place."""
        if self._own.ranks:
            largest = self._config.model.lora.r
            ranks_C = torch.tensor(self._own.ranks_of(clients, largest), dtype=torch.int64)
            cut_(views(sent_CP, self._sent_sites, largest), torch.arange(len(clients)), ranks_C)

    def _part(
        self, sent_CP: Tensor, rows: Sequence[int], at_server: bool, cuts: Sequence[int] | None
    ) -> Tensor:
        """One side's columns of some rows, a copy; of its cut only, where a row is one client's."""
        width = self._client_columns
        if not at_server:
            part = sent_CP[rows, :width]
        elif self._middle.empty:
            return sent_CP[rows, width:]
        else:
            part = torch.cat([sent_CP[rows, self._middle.columns], sent_CP[rows, width:]], 1)
        if cuts is not None:
            self._middle.clear_(part, at_server, cuts)
        return part

    def _stage_own_starts(self) -> list[tuple[Staged, ...]]:
        """A page for each learner, where the method has each begin with numbers of its own."""
        if self._config.method.begins_alike():
            return []
        lora, seed = self._config.model.lora, self._config.seed
        sides = {"client.values": self._cut.outer, "trunk.values": self._cut.sites["trunk"]}
        files: list[tuple[Staged, ...]] = []
        for at, some in enumerate(deal(self._learners, WRITTEN)):
            tensors = {
                name: torch.stack([start(sites, lora, seed, learner) for learner in some])
                for name, sites in sides.items()
            }
            files.append((self._rounds.stage(0, f"own-start-{at}", some, tensors),))
        return files

    def _stage_others(
        self, round: int, accepted: Sequence[str], columns: Sequence[slice], theta_1P: Tensor
    ) -> list[tuple[Staged, ...]]:
        """Pages of all who have no row of the mixture, with the columns that are everyone's.

        Who never trained has no page and needs none: everyone's is written for all of them.
        """
        if not columns:
            return []
        kind = self._rule.received[0]
        owners = {
            owner
            for name in (f"client.{kind}", f"trunk.{kind}")
            for owner in self._rounds.owners(round - 1, name)
        }
        others = sorted((owners & set(self._learners)) - set(accepted))
        files: list[tuple[Staged, ...]] = []
        for at, some in enumerate([(EVERYONE,), *deal(others, WRITTEN)]):
            rows = self._sent_at(round - 1, some, kind)
            for own in columns:
                rows[:, own] = theta_1P[:, own]
            self._cut_(some, rows)
            files.append(self._stage_rows(round, f"others-{at}" if at else "everyone", some, rows))
        return files

    def _stage_rows(
        self,
        round: int,
        holder: str,
        clients: Sequence[str],
        sent_CP: Tensor,
        control_CP: Tensor | None = None,
    ) -> tuple[Staged, ...]:
        """Whole rows as pages of what clients receive; everyone's has what anybody might hold."""
        if not sent_CP.shape[1]:
            return ()
        whole = self._middle.empty or list(clients) == [EVERYONE]
        cuts, rows = None if whole else self._own.cuts_of(clients), list(range(len(clients)))
        given = [sent_CP] if control_CP is None else [sent_CP, control_CP]
        tensors = {}
        for kind, rows_CP in zip(self._rule.received, given, strict=False):
            tensors[f"trunk.{kind}"] = self._part(rows_CP, rows, True, cuts)
            if self._client_columns:
                tensors[f"client.{kind}"] = self._part(rows_CP, rows, False, cuts)
        return (self._rounds.stage(round, holder, clients, tensors),)

    def _expect(self, round: int, answers: Sequence[tuple[Staged, ...]]) -> list[Staged]:
        staged = tuple(one for files in answers for one in files)
        self._pending = (round, staged)
        return list(staged)

    def _seated(self, clients: Sequence[str]) -> list[tuple[str, ...]]:
        """Who of them sits in which actor."""
        seated: list[list[str]] = [[] for _ in range(self._num_hosts)]
        for client in clients:
            seated[self._host[client]].append(client)
        return [tuple(here) for here in seated]

    def _each(self, value: Any) -> list[Any]:
        return [value] * self._num_hosts


def _on_time(
    updates: Sequence[Update], asked: Sequence[str], wanted: int | None
) -> tuple[list[Update], tuple[str, ...]]:
    """The first answers, as many as wanted, and who of those asked is not among them."""
    came = sorted((s, c) for u in updates for c, s in zip(u.clients, u.seconds, strict=True))
    counted = {client for _, client in came[:wanted]}
    late = tuple(c for c in asked if c not in counted)
    return ([_without(update, counted) for update in updates] if late else list(updates)), late


def _without(update: Update, counted: Collection[str]) -> Update:
    rows = [i for i, c in enumerate(update.clients) if c in counted]
    return replace(
        update,
        clients=tuple(update.clients[i] for i in rows),
        theta_SP=update.theta_SP[rows],
        losses=tuple(update.losses[i] for i in rows),
        samples=tuple(update.samples[i] for i in rows),
        seconds=tuple(update.seconds[i] for i in rows),
        refused={c: why for c, why in update.refused.items() if c in counted},
    )


def _choose(learners: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """A sample that depends on the roster alone."""
    if count is None or count >= len(learners):
        return learners
    chosen = np.random.default_rng(0).choice(len(learners), count, replace=False)
    return tuple(learners[i] for i in sorted(chosen.tolist()))


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
    privacy = config.privacy
    if not isinstance(privacy, NoPrivacy) and privacy.key is not None:
        privacy = privacy.model_copy(update={"key": privacy.key.absolute()})
    config = config.model_copy(update={"data": here, "privacy": privacy})
    backbone = share(f"client {world.key(config)}", world.client_side(config))
    catalogue = share(f"catalogue {world.key(config)}", world.catalogue)
    hosts = deal(sorted(world.seats), config.clients.together)
    seats = [{c: world.seats[c] for c in host} for host in hosts]
    owns = [world.own.select([*seat, *chain.from_iterable(seat.values())]) for seat in seats]
    common = (backbone, catalogue, remote, rounds)
    return [
        (config, i, _share_names(share, seat), *common, _share_own(share, own))
        for i, (seat, own) in enumerate(zip(seats, owns, strict=True))
    ]


def _share_names(share: Callable[[str, Any], Any], names: Any) -> Any:
    """Ids or seats, under a name that follows from them: an actor's plain arguments must be few."""
    return share(f"names {hashlib.sha256(json.dumps(names).encode()).hexdigest()}", names)


def _share_own(share: Callable[[str, Any], Any], own: Own) -> Any:
    """As `_share_names`; nothing is shared where nothing is own."""
    if own == ALIKE:
        return own
    return share(f"own {hashlib.sha256(json.dumps(own.tree()).encode()).hexdigest()}", own)
