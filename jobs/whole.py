"""The uncut model in one process, trained the ordinary way: what the split is measured against.

The same parts, adapters, batches and losses as a `Client` and its server, but one graph that is
kept from forward to backward, no messages and no ledger. Equal to them bit for bit.

Shapes: N rows of a step, L real tokens of all rows together, d width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fellray.actors.world import Catalogue
from fellray.platform import packed as packing
from fellray.platform.adapters import start
from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig
from fellray.platform.encoder import Backbone
from fellray.platform.kernel import Loras
from fellray.platform.lanes import Lanes
from fellray.platform.packed import PackedBlocks
from fellray.platform.reader import Batch, Reader
from fellray.platform.retrieval import Scorer, mean_losses
from fellray.platform.shards import Dataset
from fellray.platform.split import cut_model
from fellray.platform.tower import Tower


class Whole:
    """Clients side by side who have the whole model to themselves."""

    def __init__(
        self,
        config: RunConfig,
        learners: Sequence[str],
        backbone: Backbone,
        catalogue: Catalogue,
    ):
        """Torch uses `clients.threads` threads."""
        torch.set_num_threads(config.clients.threads)
        self._config = config
        parts = cut_model(backbone, config.model)
        sites = parts.cut.outer
        inner = parts.cut.sites["trunk"]
        self._start = [start(part, config.model.lora, config.seed) for part in (sites, inner)]
        self._outer, self._inner = (
            Bank(part, config.model.lora, config.train, len(learners)) for part in (sites, inner)
        )
        self._trunk = PackedBlocks(parts.trunk)
        self._sites = inner
        self._tower = Tower(parts.bottom, parts.top, catalogue.tokens.pad, self._outer)
        data = Dataset(config.data.path)
        shards = {learner: [data.shard(learner)] for learner in learners}
        self._reader = Reader(config, catalogue.tokens, shards)
        model = config.model
        self._scorer = Scorer(
            catalogue.vectors_Id, self._reader.shards, model.temperature, model.prior
        )

    def fit(self, round: int) -> tuple[float, ...]:
        """Train a round from the seeded start; each learner's mean loss over its histories."""
        count = len(self._reader.learners)
        for bank, values_P in zip((self._outer, self._inner), self._start, strict=True):
            bank.reset(torch.arange(count), {"values": values_P.expand(count, -1)})
        weighted, rows = torch.zeros(2, count, dtype=torch.float64)
        for batch, target_N in self._reader.steps(round):
            count_S = torch.bincount(batch.slot_N, minlength=count)
            weighted += self._step(batch, target_N) * count_S
            rows += count_S
        return tuple((weighted / rows).tolist())

    def _step(self, batch: Batch, target_N: Tensor) -> Tensor:
        rows, spec = batch.rows, self._config.model.lora
        bank = self._inner
        present, lane_N = batch.slot_N.unique(return_inverse=True)
        ranks_K = bank.ranks_S[present]
        lanes = Lanes(rows.lengths_N, lane_N, self._config.model.pad_multiple, ranks_K)
        adapter = Loras(
            self._sites,
            lanes.stacks,
            [spec.r] * len(lanes.stacks),
            spec.scaling_of,
            present[lanes.order_K],
            bank.values_SP,
            bank.gradient.total_SP,
        )
        packed = packing.Batch(lanes, [adapter])

        def cross(h_Ld: Tensor) -> Tensor:
            y: Tensor = _Inner.apply(h_Ld, self._trunk, packed)  # type: ignore[no-untyped-call]
            return y

        vectors_Nd, outer = self._tower.encode(rows, batch.ids_L, batch.slot_N, cross, True)
        scores_NI = self._scorer.score(vectors_Nd, batch.shard_N)
        loss_S = mean_losses(scores_NI, target_N, batch.slot_N, len(self._reader.learners))
        loss_S.sum().backward()
        for slots_n, pairs in outer:
            self._outer.gradient.add(slots_n, pairs)
        for bank in (self._outer, self._inner):
            bank.step(present)
        return loss_S.detach().double()


class _Inner(torch.autograd.Function):
    """The middle blocks in the client's own graph."""

    @staticmethod
    def forward(ctx: Any, h_Ld: Tensor, trunk: PackedBlocks, packed: packing.Batch) -> Tensor:
        ctx.trunk, ctx.packed = trunk, packed
        y_Md, ctx.saved = trunk.forward(packed.lanes.spread(h_Ld), packed, keep=True)
        return packed.lanes.collect(y_Md)

    @staticmethod
    def backward(ctx: Any, g_Ld: Tensor) -> tuple[Tensor, None, None]:
        lanes = ctx.packed.lanes
        down_Md = ctx.trunk.backward(lanes.spread(g_Ld), ctx.saved, ctx.packed)
        return lanes.collect(down_Md), None, None


def tokens_per_step(config: RunConfig, learners: Sequence[str], catalogue: Catalogue) -> float:
    """Real tokens of a step of clients side by side, on average over round 1."""
    data = Dataset(config.data.path)
    shards = {learner: [data.shard(learner)] for learner in learners}
    steps = list(Reader(config, catalogue.tokens, shards).steps(1))
    return sum(len(batch.ids_L) for batch, _ in steps) / len(steps)
