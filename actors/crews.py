"""Crews: some of an actor's learners side by side, at their desks and over the cut.

One forward pass is for a crew, each row with its own client's adapters; while one crew's rows are
in the trunk, another works here. It does not know where the trunk runs, who takes part in a round,
or what becomes of what was trained.

Shapes: S slots, N rows of a step, I items.
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
from fellray.platform.config import RunConfig
from fellray.platform.desk import Desk, LessonReader, WritingDesk
from fellray.platform.grounding import Grounding
from fellray.platform.messages import Activation, Gradient, Lease
from fellray.platform.metrics import Evaluator, Score
from fellray.platform.own import Own
from fellray.platform.reader import Batch, Reader
from fellray.platform.retrieval import Scorer
from fellray.platform.script import Script
from fellray.platform.seating import deal
from fellray.platform.shards import Dataset
from fellray.platform.slots import Slots
from fellray.platform.span import Span, Trip, take_turns
from fellray.platform.split import Parts
from fellray.platform.tower import Tower
from fellray.platform.wire import Wire

NO_MODEL = ("popularity", "prior")
"""Rows that need no model: global popularity, and the client's own counts alone."""


class Crews:
    """The data of learners, bottom and top, and what a few learners do with them at a time."""

    def __init__(
        self,
        config: RunConfig,
        seats: Mapping[str, Sequence[str]],
        catalogue: Catalogue,
        parts: Parts,
        slots: Slots,
        span: Span,
        wire: Wire,
        own: Own,
        device: torch.device,
    ):
        """Args: seats: learner -> whose shards it reads. slots: where their adapters are."""
        self._config = config
        self._seats = seats
        self._catalogue = catalogue
        self._slots = slots
        self._span = span
        self._wire = wire
        self._own = own
        self._device = device
        self._data = Dataset(config.data.path)
        self._vectors = from_dlpack(catalogue.vectors_Id).to(device)
        self._desks: tuple[tuple[str, ...], list[Desk]] = ((), [])
        self._ends = (parts.bottom.to(device), parts.top.to(device), catalogue.tokens.pad)
        self._script: tuple[Script, Grounding] | None = None
        if catalogue.wording:
            titles = self._data.titles
            script = Script(catalogue.wording, config.model, titles)
            self._script = (script, Grounding(titles, self._vectors))

    def train(
        self,
        round: int,
        learners: tuple[str, ...],
        slots: Tensor,
        lease: Lease,
        until: float = math.inf,
    ) -> tuple[list[float], list[int]]:
        """One round of a few learners side by side: losses and samples.

        Args:
            slots: where each one's adapters are.
            until: no step begins after that, by `time.monotonic`: who has not come to an end then
                stays half trained.
        """
        crews = zip(self._sit(learners), slots.split(self._crew_size(learners)), strict=True)
        found = take_turns(self._train_crew(desk, own, round, lease, until) for desk, own in crews)
        weighted, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
        losses: list[float] = (weighted / rows).tolist()
        return losses, [int(n) for n in rows.tolist()]

    def evaluate(
        self,
        round: int,
        learners: tuple[str, ...],
        slots: Tensor,
        split: Literal[1, 2],
        max_users: int | None,
    ) -> dict[str, Score]:
        """Full ranking of a few learners' held-out users (split 1 validation, 2 test)."""
        crews = zip(self._sit(learners), slots.split(self._crew_size(learners)), strict=True)
        with torch.no_grad():
            found = take_turns(
                self._rank(desk, own, round, split, max_users) for desk, own in crews
            )
        return {client: score for crew in found for client, score in crew.items()}

    def evaluate_baselines(
        self, learners: tuple[str, ...], split: Literal[1, 2]
    ) -> dict[str, dict[str, Score]]:
        """The rows of `NO_MODEL`, of a few learners."""
        popularity = from_dlpack(self._catalogue.popularity_I).float().to(self._device)
        found: dict[str, dict[str, Score]] = {name: {} for name in NO_MODEL}
        for desk in self._sit(learners):
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

    def _train_crew(
        self, desk: Desk, slots: Tensor, round: int, lease: Lease, until: float
    ) -> Trip[tuple[Tensor, Tensor]]:
        """A crew's steps: the losses of all rows of each learner, summed, and how many rows."""
        num = len(desk.reader.learners)
        weighted, rows = torch.zeros(2, num, dtype=torch.float64)
        for step, (batch, target_N) in enumerate(desk.reader.steps(round)):
            if time.monotonic() > until:
                break
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
