"""Clients: private data, labels, and the bottom and top of the model, which stay in this process.

One actor holds one or many clients; as many as have slots train side by side, in crews. What they
report, receive and put down is decided here, what a crew does over the cut is not. The class is
plain; `Pool` makes it an actor, tests use it as it is. It does not know where the trunk runs, how
updates are mixed, or what Ray is.

Shapes: S slots, P parameters of a client's side.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fellray.actors.crews import NO_MODEL, Crews
from fellray.actors.world import Catalogue
from fellray.platform.adapters import find_columns, name_blocks, start
from fellray.platform.allocator import give_back_freed_memory
from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig
from fellray.platform.device import choose_device
from fellray.platform.encoder import Backbone
from fellray.platform.ledger import Ledger
from fellray.platform.manifest import Staged
from fellray.platform.messages import (
    Installation,
    Lease,
    LedgerRow,
    StaleLease,
    Update,
)
from fellray.platform.metrics import Score
from fellray.platform.own import ALIKE, Own
from fellray.platform.privacy import find_key, privatise_round
from fellray.platform.privacy_config import NoPrivacy
from fellray.platform.residual import Residual
from fellray.platform.rounds import Rounds
from fellray.platform.seating import deal, deal_ahead
from fellray.platform.slots import Slots
from fellray.platform.span import Remote, Span
from fellray.platform.split import cut_model
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
        self.learners = tuple(sorted(seats))
        """Who has a seat here, sorted."""
        device = choose_device(config.clients.gpu_denominator > 0)
        self._device = device
        parts = cut_model(backbone, config.model)
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
        self._ledger = Ledger()
        self._span = Span(remote, self._ledger)
        wire = Wire(config, backbone.dim)
        self._crews = Crews(
            config, seats, catalogue, parts, self._slots, self._span, wire, own, device
        )
        adapted = [*parts.bottom.blocks.adapted, *parts.top.blocks.adapted]
        self._residual = Residual(config, sites, adapted, rounds)
        self._sent = find_columns(name_blocks(sites, lora.r), config.method.sends)
        """The columns of a row that leave this process; None: all."""
        self._key = find_key(config)
        self._started: dict[str, Tensor] = {}
        """The values at the round's start, where the upload is made private."""
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

        As many as `clients.slots` says train side by side; the next ones follow. At the deadline
        all stop; those who train side by side are left out where one of them was not done.

        Raises:
            StaleLease: the server was lost, or begins the round again.
        """
        began = time.monotonic()
        until = math.inf if deadline_s is None else began + deadline_s
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
        for learners, following in deal_ahead(clients, self._config.clients.slots):
            if self._rule.twin:
                lease, _, _ = self._train(round, learners, until, twin=True)
                self._slots.finish(learners)
                if time.monotonic() > until:  # the server may have half of an anchor
                    break
                lives.add(lease.server)
            lease, own, counted = self._train(round, learners, until, following)
            self._slots.finish(learners)
            if len(clients) > len(learners):  # else it grows from wave to wave
                give_back_freed_memory()
            done = time.monotonic()
            if done > until:
                break
            seconds += [done - began] * len(learners)
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
        self._residual.bring(round)
        scores: dict[str, Score] = {}
        for few, following in deal_ahead(learners, self._config.clients.slots):
            slots = self._slots.hold(round, few).to(self._device)
            self._slots.fetch(round, following)
            scores |= self._crews.evaluate(round, few, slots, split, max_users)
        return scores

    def evaluate_baselines(
        self, split: Literal[1, 2], learners: Sequence[str]
    ) -> dict[str, dict[str, Score]]:
        """Rows that need no model: global popularity, and the client's own counts alone."""
        found: dict[str, dict[str, Score]] = {name: {} for name in NO_MODEL}
        for few in deal(learners, self._config.clients.slots):
            for name, scores in self._crews.evaluate_baselines(few, split).items():
                found[name] |= scores
        return found

    def close_ledger(self) -> list[LedgerRow]:
        """What was exchanged since the last call."""
        return self._ledger.close()

    def forget(self) -> None:
        """Drop what is in memory: the next call starts from the last committed round."""
        self._slots.clear()
        self._residual.forget()
        self._fitted = self._installed = -1

    def stage_start(self) -> tuple[Staged, ...]:
        """Stage round 0: the one seeded start that every client shares."""
        return self._slots.stage_start(self._seeded)

    def _train(
        self,
        round: int,
        learners: tuple[str, ...],
        until: float,
        following: Sequence[str] = (),
        twin: bool = False,
    ) -> tuple[Lease, list[float], list[int]]:
        """One round of a few learners side by side, or of their anchors: losses and samples.

        Args:
            following: whose pages are read meanwhile.
        """
        leave = self._span.remote.begin(self._config.name, round, learners, twin)
        slots = self._slots.hold(round - 1, learners).to(self._device)
        self._slots.fetch(round - 1, following)
        self._residual.bring(round - 1)
        if len(self._residual.numbers):
            self._ledger.enter_each(learners, "residual_down", self._residual.numbers)
        self._slots.train(learners, twin)
        if not isinstance(self._config.privacy, NoPrivacy):
            self._started |= dict(zip(learners, self._slots.values(learners), strict=True))
        lease = leave()
        losses, samples = self._learn(round, learners, slots, lease, until)
        return lease, losses, samples

    def _learn(
        self, round: int, learners: tuple[str, ...], slots: Tensor, lease: Lease, until: float
    ) -> tuple[list[float], list[int]]:
        """The steps of `_train`."""
        return self._crews.train(round, learners, slots, lease, until)


def _refuse(loss: float, finite: bool) -> str | None:
    """Why a learner's round cannot be used."""
    if not math.isfinite(loss):
        return f"training loss is {loss}"
    if not finite:
        return "the update holds a NaN or an infinity"
    return None
