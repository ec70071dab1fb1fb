"""Clients: private data, labels, and the bottom and top of the model, which stay in this process.

One actor holds one or many clients (slots) and trains them side by side: one forward pass for a
crew of them, each row with its own client's adapters; while one crew's rows are in the trunk,
another crew works here. The class is plain; `Pool` makes it an actor, tests use it as it is. It
does not know where the trunk runs, how updates are mixed, or what Ray is.

Shapes: S slots, N rows of a step, P parameters of a client's side, I items.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fellray.actors.world import Catalogue
from fellray.platform.adapters import find_columns, name_blocks, start
from fellray.platform.allocator import give_back_freed_memory
from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig
from fellray.platform.desk import Desk, LessonReader, WritingDesk
from fellray.platform.device import own_device
from fellray.platform.encoder import Backbone
from fellray.platform.grounding import Grounding
from fellray.platform.ledger import Ledger
from fellray.platform.manifest import Staged
from fellray.platform.messages import (
    Activation,
    Gradient,
    Installation,
    Lease,
    LedgerRow,
    StaleLease,
    Update,
)
from fellray.platform.metrics import Evaluator, Score
from fellray.platform.own import ALIKE, Own
from fellray.platform.privacy import find_key, privatise_round
from fellray.platform.privacy_config import NoPrivacy
from fellray.platform.reader import Batch, Reader
from fellray.platform.retrieval import Scorer
from fellray.platform.rounds import Rounds
from fellray.platform.script import Script
from fellray.platform.seating import deal
from fellray.platform.shards import Dataset
from fellray.platform.slots import Slots
from fellray.platform.span import Remote, Span, Trip, take_turns
from fellray.platform.split import cut_model
from fellray.platform.tower import Tower
from fellray.platform.wire import Wire


class Client:
    """The clients of one actor. Those who take part in a round have slots; the others, files."""

    def __init__(
        self,
        config: RunConfig,
        index: int,
        seats: Mapping[str, Sequence[str]],
        backbone: Backbone,
        catalogue: Catalogue,
        remote: Remote,
        rounds: Rounds,
        own: Own = ALIKE,
    ):
        """Args: index: names this actor's files. seats: learner -> whose shards it reads."""
        torch.set_num_threads(config.clients.threads)
        self._config = config
        self._holder = f"clients-{index:05d}"
        self._rounds = rounds
        self._own = own
        self._catalogue = catalogue
        self._data = Dataset(config.data.path)
        self._seats = dict(sorted(seats.items()))
        self.learners = tuple(self._seats)
        """Who has a seat here, sorted."""
        device = own_device()
        self._device = device
        self._vectors = from_dlpack(catalogue.vectors_Id).to(device)
        self._desks: tuple[tuple[str, ...], list[Desk]] = ((), [])
        parts = cut_model(backbone, config.model)
        bottom, top = parts.bottom.to(device), parts.top.to(device)
        sites = parts.cut.outer
        lora, rule = config.model.lora, config.method.local()
        self._rule = rule
        self._slots = Slots(
            lambda slots: Bank(sites, lora, config.train, slots, device, rule),
            "client",
            config.train.moments == "keep",
            rounds,
            own,
        )
        self._ends = (bottom, top, catalogue.tokens.pad)
        self._script: tuple[Script, Grounding] | None = None
        if catalogue.wording:
            titles = self._data.titles
            script = Script(catalogue.wording, config.model, titles)
            self._script = (script, Grounding(titles, self._vectors))
        self._ledger = Ledger()
        self._span = Span(remote, self._ledger)
        self._sent = find_columns(name_blocks(sites, lora.r), config.method.sends)
        """The columns of a row that leave this process; None: all."""
        self._key = find_key(config)
        self._started: dict[str, Tensor] = {}
        """The values at the round's start, where the upload is made private."""
        self._wire = Wire(config, backbone.dim)
        self._seeded = start(sites, lora, config.seed)
        self._fitted = self._installed = -1
        self._staged: tuple[Staged, ...] = ()

    def fit(
        self,
        round: int,
        clients: Sequence[str],
        deadline_s: float | None = None,
        server: int = 0,
    ) -> Update:
        """Local split training of `clients`, who have their seats here, from the committed state.

        As many as `clients.slots` says train side by side; the next ones follow. Whoever is not
        done by the deadline is left out.

        Raises:
            StaleLease: the server was lost, or begins the round again.
        """
        began = time.monotonic()
        self._span.choose(server)
        self._ledger.void()
        self._slots.release()
        self._fitted = round
        self._started.clear()
        share = self._config.train.share == "all"
        losses: list[float] = []
        samples: list[int] = []
        seconds: list[float] = []
        lives = set()
        for learners in deal(clients, self._config.clients.slots):
            if self._rule.twin:
                lease, _, _ = self._train(round, learners, True)
                self._slots.finish(learners)
                lives.add(lease.server)
            lease, own, counted = self._train(round, learners)
            self._slots.finish(learners)
            if len(clients) > len(learners):  # else it grows from wave to wave
                give_back_freed_memory()
            done = time.monotonic() - began
            if deadline_s is not None and done > deadline_s:
                break
            seconds += [done] * len(learners)
            lives.add(lease.server)
            losses += own
            samples += counted
        clients = tuple(clients[: len(losses)])
        whole, usable = self._slots.report(clients)
        refused = {
            learner: reason
            for learner, loss, finite in zip(clients, losses, usable, strict=True)
            if (reason := _refuse(loss, finite))
        }
        sent, stage = whole, self._config.privacy
        if not isinstance(stage, NoPrivacy) and clients:
            start = torch.stack([self._started.pop(c) for c in clients])
            sent, losses = privatise_round(
                start, whole, losses, stage, self._key, round, clients, refused
            )
        sent = sent if share else sent[:, :0]
        if share and self._sent is not None:
            sent = sent[:, self._sent]
        for learner, values, loss in zip(clients, sent, losses, strict=True):
            self._ledger.enter(learner, "adapter_up", values.numpy())
            if isinstance(stage, NoPrivacy) or not math.isnan(loss):  # a NaN is not sent
                self._ledger.enter(learner, "loss", np.array(loss))
        return Update(
            tuple(sorted(lives)),
            clients,
            sent.numpy(),
            tuple(losses),
            tuple(samples),
            tuple(seconds),
            refused,
        )

    def install(self, installation: Installation) -> tuple[Staged, ...]:
        """Make the mixture the state of the round and stage it; asked twice, answers the same.

        Raises:
            StaleLease: this actor lost what it trained (it was restarted since): replay the round.
        """
        round, clients = installation.round, installation.clients
        if round == self._installed:
            return self._staged
        if round != self._fitted or not self._slots.have_finished(clients):
            raise StaleLease(f"{self._holder} was restarted after training")
        mixed = self._config.train.share == "all"
        if mixed and clients:
            theta = installation.theta_SP
            if installation.common:
                self._ledger.enter_each(clients, "adapter_down", theta[0])
            else:
                for client, values in zip(clients, theta, strict=True):
                    self._ledger.enter(client, "adapter_down", values)
            self._slots.replace(clients, from_dlpack(theta), self._sent)
        accepted = [c for c in clients if c not in installation.refused]
        own = not (mixed and installation.common)
        self._staged = self._slots.stage(round, self._holder, accepted, own)
        self._slots.release()
        self._installed = round
        return self._staged

    def evaluate(
        self,
        round: int,
        split: Literal[1, 2],
        max_users: int | None,
        learners: Sequence[str],
        staged: Sequence[Staged] | None = None,
        server: int = 0,
    ) -> dict[str, Score]:
        """Full ranking of each learner's held-out users (split 1 validation, 2 test).

        Args:
            staged: the files of `round`, where it is not committed yet.

        Raises:
            StaleLease: as `fit`.
        """
        self._span.choose(server)
        if staged is not None:
            self._rounds.expect(round, staged)
        scores: dict[str, Score] = {}
        for few in deal(learners, self._config.clients.slots):
            slots = self._slots.hold(round, few).to(self._device).split(self._crew_size(few))
            crews = zip(self._sit(few), slots, strict=True)
            with torch.no_grad():
                found = take_turns(
                    self._rank(desk, own, round, split, max_users) for desk, own in crews
                )
            for crew in found:
                scores |= crew
        return scores

    def evaluate_baselines(
        self, split: Literal[1, 2], learners: Sequence[str]
    ) -> dict[str, dict[str, Score]]:
        """Rows that need no model: global popularity, and the client's own counts alone."""
        popularity = from_dlpack(self._catalogue.popularity_I).float().to(self._device)
        found: dict[str, dict[str, Score]] = {"popularity": {}, "prior": {}}
        for few in deal(learners, self._config.clients.slots):
            for desk in self._sit(few):
                rows = {
                    "popularity": popularity.expand(len(desk.reader.shards), -1),
                    "prior": desk.scorer.prior_KI,
                }
                for name, scores_KI in rows.items():
                    evaluators = self._evaluators(desk)
                    for batch, seen, truth in desk.reader.held_out(split, None):
                        scores = scores_KI[batch.shard_N]
                        evaluators[_owner(desk, batch)].add(scores, seen, truth)
                    found[name] |= {client: e.score() for client, e in evaluators.items()}
        return found

    def close_ledger(self) -> list[LedgerRow]:
        """What was exchanged since the last call."""
        return self._ledger.close()

    def forget(self) -> None:
        """Drop what is in memory: the next call starts from the last committed round."""
        self._slots.clear()
        self._fitted = self._installed = -1

    def stage_start(self) -> tuple[Staged, ...]:
        """Stage round 0: the one seeded start that every client shares."""
        return self._slots.stage_start(self._seeded)

    def _train(
        self, round: int, learners: tuple[str, ...], twin: bool = False
    ) -> tuple[Lease, list[float], list[int]]:
        """One round of a few learners side by side, or of their anchors: losses and samples."""
        leave = self._span.remote.begin(self._config.name, round, learners, twin)
        slots = self._slots.hold(round - 1, learners).to(self._device)
        self._slots.train(learners, twin)
        if not isinstance(self._config.privacy, NoPrivacy):
            self._started |= dict(zip(learners, self._slots.values(learners), strict=True))
        lease = leave()
        crews = zip(self._sit(learners), slots.split(self._crew_size(learners)), strict=True)
        found = take_turns(self._train_crew(desk, own, round, lease) for desk, own in crews)
        weighted, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
        losses: list[float] = (weighted / rows).tolist()
        return lease, losses, [int(n) for n in rows.tolist()]

    def _train_crew(
        self, desk: Desk, slots: Tensor, round: int, lease: Lease
    ) -> Trip[tuple[Tensor, Tensor]]:
        """A crew's steps: the losses of all rows of each learner, summed, and how many rows."""
        num = len(desk.reader.learners)
        weighted, rows = torch.zeros(2, num, dtype=torch.float64)
        for step, (batch, target_N) in enumerate(desk.reader.steps(round)):
            count_S = torch.bincount(batch.slot_N.cpu(), minlength=num)
            header = self._header(desk, batch, round, step, lease)
            # of one's own, not of the crew's: who has fewer histories is done before the others
            learners = desk.reader.learners
            done = tuple(learners[slot] for slot in desk.reader.ends(step))
            loss_S = yield from self._step(desk, batch, slots[batch.slot_N], target_N, header, done)
            weighted += loss_S * count_S
            rows += count_S
        return weighted, rows

    def _step(
        self,
        desk: Desk,
        batch: Batch,
        slot_N: Tensor,
        target_N: Tensor,
        header: Activation,
        done: tuple[str, ...],
    ) -> Trip[Tensor]:
        """One local step, twice over the cut: each learner's loss."""
        bank, tower = self._slots.bank, self._tower()
        h_Ld, used = tower.rise(batch.rows, batch.ids_L, slot_N, True)
        activation = self._wire.send_activation(header, h_Ld)
        output = yield self._span.forward(activation)
        y_Ld = self._wire.read_output(output).to(h_Ld.device).requires_grad_()
        loss_S = desk.losses(tower, batch, target_N, y_Ld, used)
        loss_S.sum().backward()
        assert y_Ld.grad is not None
        g_Ld = self._wire.send_gradient(y_Ld.grad, activation)
        gradient = Gradient(header.run, header.round, header.step, g_Ld, done)
        down = yield self._span.backward(activation, gradient)
        down_Ld = self._wire.read_input(down)
        if down_Ld is not None:
            h_Ld.backward(down_Ld.to(h_Ld.device))
        for slots_n, pairs in used:
            bank.gradient.add(slots_n, pairs)
        bank.step(slot_N.unique())
        return loss_S.detach().cpu().double()

    def _tower(self) -> Tower:
        return Tower(*self._ends, self._slots.bank, self._wire.pooled)

    def _header(
        self, desk: Desk, batch: Batch, round: int, step: int, lease: Lease | None
    ) -> Activation:
        # who is done with its histories has no row, and the server expects no step of it
        present, owner_N = np.unique(batch.slot_N.cpu().numpy(), return_inverse=True)
        learners = desk.reader.learners
        return Activation(
            run=self._config.name,
            round=round,
            step=step,
            lease=lease,
            clients=tuple(learners[i] for i in present.tolist()) if lease else learners,
            row_client_N=(owner_N if lease else present[owner_N]).astype(np.int32),
            lengths_N=batch.rows.lengths_N.numpy().astype(np.int32),
            h_Ld=np.empty((0, 0), np.float32),
        )

    def _rank(
        self, desk: Desk, slots: Tensor, round: int, split: Literal[1, 2], max_users: int | None
    ) -> Trip[dict[str, Score]]:
        """A crew's scores."""
        evaluators, tower = self._evaluators(desk), self._tower()
        for step, (batch, seen, truth) in enumerate(desk.reader.held_out(split, max_users)):
            header = self._header(desk, batch, round, step, None)
            scores = yield from desk.rank(tower, batch, slots[batch.slot_N], header, self._span)
            desk.judge(evaluators[_owner(desk, batch)], scores, seen, truth)
        return {client: evaluator.score() for client, evaluator in evaluators.items()}

    def _evaluators(self, desk: Desk) -> dict[str, Evaluator]:
        return {shard.client: Evaluator(len(self._vectors)) for shard in desk.reader.shards}

    def _sit(self, learners: tuple[str, ...]) -> list[Desk]:
        """The data of a few learners by crew, read when they take part."""
        if self._desks[0] != learners:
            crews = deal(learners, self._crew_size(learners))
            self._desks = (learners, [self._desk(crew) for crew in crews])
        return self._desks[1]

    def _crew_size(self, learners: Sequence[str]) -> int:
        return -(-len(learners) // self._config.clients.crews)

    def _desk(self, crew: tuple[str, ...]) -> Desk:
        shards = {c: [self._data.shard(own) for own in self._seats[c]] for c in crew}
        given = (self._config, self._catalogue.tokens, shards, self._device, self._own)
        model = self._config.model
        reader = LessonReader(self._script[0], *given) if self._script else Reader(*given)
        scorer = Scorer(self._vectors, reader.shards, model.temperature, model.prior, self._device)
        if not self._script:
            return Desk(reader, scorer, self._wire)
        bottom, top, pad = self._ends
        assert top.head
        plain = Tower(bottom, top, pad, None)
        multiple, rule = model.pad_multiple, model.generation
        return WritingDesk(
            reader, scorer, self._wire, *self._script, top.head, plain, multiple, rule
        )


def _owner(desk: Desk, batch: Batch) -> str:
    """Whose held-out users these are: those of one shard."""
    return desk.reader.shards[int(batch.shard_N[0])].client


def _refuse(loss: float, finite: bool) -> str | None:
    """Why a learner's round cannot be used."""
    if not math.isfinite(loss):
        return f"training loss is {loss}"
    if not finite:
        return "the update holds a NaN or an infinity"
    return None
