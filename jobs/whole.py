"""The uncut model in one process, trained the ordinary way: what the split is measured against.

The same parts, adapters, batches and losses as a `Client` and its server, but one graph that is
kept from forward to backward, no messages and no ledger. Equal to them bit for bit.

Shapes: N rows of a step, L real tokens of all rows together, d width.
"""

import torch
from torch import Tensor

from fellray.actors.client import SIDES
from fellray.actors.world import Catalogue
from fellray.platform.adapters import Bank, Pair, start
from fellray.platform.config import RunConfig
from fellray.platform.encoder import Backbone
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
        self._trunk = parts.trunk
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
        rows = batch.rows
        inner: list[tuple[Tensor, list[Pair]]] = []

        def cross(h_Ld: Tensor) -> Tensor:
            outputs = []
            for group in rows.groups:
                slots_n = batch.slot_N[group.rows_n]
                pairs = self._inner.gather(slots_n, True)
                inner.append((slots_n, pairs))
                outputs.append(self._trunk(rows.pad(h_Ld, group), group.mask_nT, [pairs]))
            return rows.pack(outputs)

        vectors_Nd, outer = self._tower.encode(rows, batch.ids_L, batch.slot_N, cross, True)
        scores_NI = self._scorer.score(vectors_Nd, batch.shard_N)
        loss = mean_losses(scores_NI, target_N, batch.slot_N, 1).sum()
        loss.backward()
        for bank, used in ((self._outer, outer), (self._inner, inner)):
            for slots_n, pairs in used:
                bank.gradient.add(slots_n, pairs)
            bank.step(_ALONE)
        return float(loss.detach().double())


def tokens_per_step(config: RunConfig, learner: str, catalogue: Catalogue) -> float:
    """Real tokens of a step of one client, on average over round 1."""
    shard = Dataset(config.data.path).shard(learner)
    steps = list(Reader(config, catalogue.tokens, {learner: [shard]}).steps(1))
    return sum(len(batch.ids_L) for batch, _ in steps) / len(steps)
