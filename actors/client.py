"""Clients: private data, labels, and the bottom and top of the model, which stay in this process.

One actor holds one or many clients (slots) and trains them side by side: one forward pass for all,
each row with its own client's adapters. The class is plain; `Pool` makes it an actor, tests use it
as it is. It does not know where the trunk runs, how updates are mixed, or what Ray is.

Shapes: S slots, N rows of a step, P parameters of a client's side, I items.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fellray.actors.world import Catalogue
from fellray.platform.adapters import Bank, start, state_names
from fellray.platform.config import RunConfig
from fellray.platform.device import own_device
from fellray.platform.encoder import Backbone
from fellray.platform.faults import require_committed
from fellray.platform.ledger import Ledger
from fellray.platform.manifest import Staged
from fellray.platform.messages import Activation, Installation, Lease, LedgerRow, StaleLease, Update
from fellray.platform.metrics import Evaluator, Score
from fellray.platform.reader import Batch, Reader
from fellray.platform.retrieval import Scorer, mean_losses
from fellray.platform.rounds import Rounds
from fellray.platform.shards import Dataset
from fellray.platform.span import Remote, RemoteSpan
from fellray.platform.split import cut_model
from fellray.platform.tower import Tower

SIDES = ("bottom", "top")


class Client:
    """The learners of one actor."""

    def __init__(
        self,
        config: RunConfig,
        index: int,
        seats: Mapping[str, Sequence[str]],
        backbone: Backbone,
        catalogue: Catalogue,
        remote: Remote,
        rounds: Rounds,
    ):
        """Args: index: names this actor's files. seats: learner -> whose shards it reads."""
        torch.set_num_threads(config.clients.threads)
        self._config = config
        self._holder = f"clients-{index:05d}"
        self._rounds = rounds
        self._catalogue = catalogue
        data = Dataset(config.data.path)
        shards = {learner: [data.shard(c) for c in own] for learner, own in sorted(seats.items())}
        self.learners = tuple(shards)
        device = own_device()
        self._all = torch.arange(len(self.learners), device=device)
        self._reader = Reader(config, catalogue.tokens, shards, device)
        parts = cut_model(backbone, config.model)
        bottom, top = parts.bottom.to(device), parts.top.to(device)
        sites = [site for side in SIDES for site in parts.cut.sites[side]]
        self._bank = Bank(sites, config.model.lora, config.train, len(self.learners), device)
        self._tower = Tower(bottom, top, catalogue.tokens.pad, self._bank)
        self._scorer = Scorer(
            catalogue.vectors_Id,
            self._reader.shards,
            config.model.temperature,
            config.model.prior,
            device,
        )
        self._ledger = Ledger()
        self._span = RemoteSpan(remote, self._ledger)
        self._keeps_moments = config.train.moments == "keep"
        self._seeded = start(sites, config.model.lora, config.seed)
        self._round = -1
        self._fitted = -1
        self._start: dict[str, Tensor] = {}
        self._staged: tuple[Staged, ...] = ()

    def fit(self, round: int) -> Update:
        """Local split training: round `round` of every learner here, from the committed state."""
        self._put_at(round - 1)
        self._bank.reset(self._all, self._start)
        self._ledger.void()
        lease = self._span.remote.begin(self._config.name, round, self.learners)
        weighted, rows = torch.zeros(2, len(self.learners), dtype=torch.float64)
        for step, (batch, target_N) in enumerate(self._reader.steps(round)):
            count_S = torch.bincount(batch.slot_N.cpu(), minlength=len(self.learners))
            weighted += (
                self._step(batch, target_N, self._header(batch, round, step, lease)) * count_S
            )
            rows += count_S
        losses = (weighted / rows).tolist()
        self._fitted = round
        theta = self._bank.values_SP.clone().cpu()
        refused = {
            learner: reason
            for learner, loss, values in zip(self.learners, losses, theta, strict=True)
            if (reason := _refuse(loss, values))
        }
        sent = theta if self._config.train.share == "all" else theta[:, :0]
        for learner, values, loss in zip(self.learners, sent, losses, strict=True):
            self._ledger.enter(learner, "adapter_up", values.numpy())
            self._ledger.enter(learner, "loss", np.array(loss))
        samples = tuple(int(n) for n in rows.tolist())
        return Update(lease, self.learners, sent.numpy(), tuple(losses), samples, refused)

    def install(self, installation: Installation) -> tuple[Staged, ...]:
        """Make the mixture the state of the round and stage it; asked twice, answers the same.

        Raises:
            StaleLease: this actor lost what it trained (it was restarted since): replay the round.
        """
        if installation.round == self._round:
            return self._staged
        if installation.round != self._fitted:
            raise StaleLease(f"{self._holder} was restarted after training")
        row_of = {client: i for i, client in enumerate(installation.clients)}
        if self._config.train.share == "all":
            rows = torch.tensor([row_of[learner] for learner in self.learners])
            theta = torch.tensor(installation.theta_SP)[rows]
            self._bank.values_SP.copy_(theta)
            for learner, values in zip(self.learners, theta, strict=True):
                self._ledger.enter(learner, "adapter_down", values.numpy())
        refused = [i for i, c in enumerate(self.learners) if c in installation.refused]
        self._bank.reset(self._all[refused], self._start)
        return self._stage(installation.round)

    def evaluate(self, round: int, split: Literal[1, 2], max_users: int | None) -> dict[str, Score]:
        """Full ranking of each client's held-out users (split 1 validation, 2 test)."""
        self._put_at(round)

        def score(batch: Batch, step: int) -> Tensor:
            header = self._header(batch, round, step, None)
            vectors, _ = self._tower.encode(
                batch.rows, batch.ids_L, batch.slot_N, lambda h: self._cross(h, header), False
            )
            return self._scorer.score(vectors, batch.shard_N)

        return self._rank(score, split, max_users)

    def evaluate_baselines(self, split: Literal[1, 2]) -> dict[str, dict[str, Score]]:
        """Rows that need no model: global popularity, and the client's own counts alone."""
        popularity = from_dlpack(self._catalogue.popularity_I).float().to(self._all.device)
        return {
            "popularity": self._rank(lambda b, _: popularity.expand(len(b.shard_N), -1), split),
            "prior": self._rank(lambda b, _: self._scorer.prior_KI[b.shard_N], split),
        }

    def close_ledger(self) -> list[LedgerRow]:
        """What was exchanged since the last call."""
        return self._ledger.close()

    def forget(self) -> None:
        """Drop what is in memory: the next call starts from the last committed round."""
        self._round = self._fitted = -1

    def stage_start(self) -> tuple[Staged, ...]:
        """Stage round 0: the one seeded start that every client shares."""
        self._bank.reset(self._all, {"values": self._seeded.repeat(len(self.learners), 1)})
        return self._stage(0)

    def _step(self, batch: Batch, target_N: Tensor, header: Activation) -> Tensor:
        vectors, used = self._tower.encode(
            batch.rows, batch.ids_L, batch.slot_N, lambda h: self._span(h, header), True
        )
        scores = self._scorer.score(vectors, batch.shard_N)
        loss_S = mean_losses(scores, target_N, batch.slot_N, len(self.learners))
        loss_S.sum().backward()
        for slots_n, pairs in used:
            self._bank.gradient.add(slots_n, pairs)
        self._bank.step(batch.slot_N.unique())
        return loss_S.detach().cpu().double()

    def _cross(self, h_Ld: Tensor, header: Activation) -> Tensor:
        output = self._span.send_forward(replace(header, h_Ld=h_Ld.cpu().numpy()))
        return from_dlpack(output).to(h_Ld.device)

    def _header(self, batch: Batch, round: int, step: int, lease: Lease | None) -> Activation:
        return Activation(
            run=self._config.name,
            round=round,
            step=step,
            lease=lease,
            clients=self.learners,
            row_client_N=batch.slot_N.cpu().numpy().astype(np.int32),
            lengths_N=batch.rows.lengths_N.numpy().astype(np.int32),
            h_Ld=np.empty((0, 0), np.float32),
        )

    def _rank(
        self,
        score: Callable[[Batch, int], Tensor],
        split: Literal[1, 2],
        max_users: int | None = None,
    ) -> dict[str, Score]:
        items = len(self._catalogue.vectors_Id)
        evaluators = {shard.client: Evaluator(items) for shard in self._reader.shards}
        with torch.no_grad():
            for step, (batch, seen, truth) in enumerate(self._reader.held_out(split, max_users)):
                owner = self._reader.shards[int(batch.shard_N[0])].client
                evaluators[owner].add(score(batch, step), seen, truth)
        return {client: evaluator.score() for client, evaluator in evaluators.items()}

    def _stage(self, round: int) -> tuple[Staged, ...]:
        self._stand_at(round)
        tensors = {f"client.{name}": t for name, t in self._start.items()}
        self._staged = (self._rounds.stage(round, self._holder, self.learners, tensors),)
        return self._staged

    def _put_at(self, round: int) -> None:
        if round == self._round:
            return
        require_committed(self._rounds, round)
        names = state_names("client", self._keeps_moments)
        loaded = self._rounds.load(round, self.learners, names)
        self._bank.reset(self._all, {n.removeprefix("client."): t for n, t in loaded.items()})
        self._stand_at(round)

    def _stand_at(self, round: int) -> None:
        self._round = round
        self._start = self._bank.state(self._keeps_moments)


def _refuse(loss: float, values_P: Tensor) -> str | None:
    """Why a learner's round cannot be used."""
    if not math.isfinite(loss):
        return f"training loss is {loss}"
    if not bool(torch.isfinite(values_P).all()):
        return "the update holds a NaN or an infinity"
    return None
