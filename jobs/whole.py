"""The uncut model in one process, trained the ordinary way: what the split is measured against.

The same parts, adapters, batches and losses as a `Client` and its server, but one graph that is
kept from forward to backward, no messages and no ledger. Equal to them bit for bit.

Shapes: N rows of a step, L real tokens of all rows together, d width.
"""

from typing import Any

import torch
from torch import Tensor

from fellray.actors.client import SIDES
from fellray.actors.world import Catalogue
from fellray.platform import packed as packing
from fellray.platform.adapters import Bank, start
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

_ALONE = torch.zeros(1, dtype=torch.int64)
"""The one slot."""


class Whole:
    """One client that has the whole model to itself."""

    def __init__(self, config: RunConfig, learner: str, backbone: Backbone, catalogue: Catalogue):
        """Torch uses `clients.threads` threads."""
        torch.set_num_threads(config.clients.threads)
        self._config = config
        parts = cut_model(backbone, config.model)
        sites = [site for side in SIDES for site in parts.cut.sites[side]]
        inner = parts.cut.sites["trunk"]
        self._start = [start(part, config.model.lora, config.seed) for part in (sites, inner)]
        self._outer, self._inner = (
            Bank(part, config.model.lora, config.train, 1) for part in (sites, inner)
        )
        self._trunk = PackedBlocks(parts.trunk)
        self._sites = inner
        self._tower = Tower(parts.bottom, parts.top, catalogue.tokens.pad, self._outer)
        shard = Dataset(config.data.path).shard(learner)
        self._reader = Reader(config, catalogue.tokens, {learner: [shard]})
        model = config.model
        self._scorer = Scorer(catalogue.vectors_Id, [shard], model.temperature, model.prior)

    def fit(self, round: int) -> float:
        """Train a round from the seeded start; its mean loss over histories."""
        for bank, values_P in zip((self._outer, self._inner), self._start, strict=True):
            bank.reset(_ALONE, {"values": values_P[None]})
        weighted, rows = 0.0, 0
        for batch, target_N in self._reader.steps(round):
            weighted += self._step(batch, target_N) * len(target_N)
            rows += len(target_N)
        return weighted / rows

    def _step(self, batch: Batch, target_N: Tensor) -> float:
        rows, spec = batch.rows, self._config.model.lora
        bank = self._inner
        lanes = Lanes(rows.lengths_N, batch.slot_N, self._config.model.pad_multiple, bank.ranks_S)
        gradient = bank.gradient.total_SP
        adapter = Loras(
            self._sites, lanes.stacks, [spec.r], spec.scaling_of, _ALONE, bank.values_SP, gradient
        )
        packed = packing.Batch(lanes, [adapter])

        def cross(h_Ld: Tensor) -> Tensor:
            y: Tensor = _Inner.apply(h_Ld, self._trunk, packed)  # type: ignore[no-untyped-call]
            return y

        vectors_Nd, outer = self._tower.encode(rows, batch.ids_L, batch.slot_N, cross, True)
        scores_NI = self._scorer.score(vectors_Nd, batch.shard_N)
        loss = mean_losses(scores_NI, target_N, batch.slot_N, 1).sum()
        loss.backward()
        for slots_n, pairs in outer:
            self._outer.gradient.add(slots_n, pairs)
        for bank in (self._outer, self._inner):
            bank.step(_ALONE)
        return float(loss.detach().double())


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


def tokens_per_step(config: RunConfig, learner: str, catalogue: Catalogue) -> float:
    """Real tokens of a step of one client, on average over round 1."""
    shard = Dataset(config.data.path).shard(learner)
    steps = list(Reader(config, catalogue.tokens, {learner: [shard]}).steps(1))
    return sum(len(batch.ids_L) for batch, _ in steps) / len(steps)
