"""Full-model FedAvg: every client trains all weights of the encoder, and everybody gets their mean.

The rival that sends whole models: the same histories in the same order, the same loss, the same
frozen item vectors, no adapters, no cut. It must not know what it is compared with.

Shapes: W weights, N rows of a step, L real tokens of all rows together, d width, I items.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fellray.actors.world import World
from fellray.platform.config import RunConfig
from fellray.platform.metrics import Evaluator, Score
from fellray.platform.reader import Batch, Reader
from fellray.platform.retrieval import Scorer, mean_losses
from fellray.platform.shards import Dataset
from fellray.platform.split import cut_model
from fellray.platform.tower import Tower, run_trunk


class FullModel:
    """One encoder, trained by one client after another from the round's start."""

    def __init__(self, config: RunConfig, world: World, learning_rate: float):
        """Args: learning_rate: AdamW's; adapters take a larger one than weights do."""
        self._config = config
        self._world = world
        self._learning_rate = learning_rate
        self._data = Dataset(config.data.path)
        parts = cut_model(world.backbone, config.model)
        self._trunk = parts.trunk
        self._tower = Tower(parts.bottom, parts.top, world.catalogue.tokens.pad, None)
        self._weights = [
            weight
            for part in (parts.bottom, parts.trunk, parts.top)
            for weight in part.parameters()
        ]
        for weight in self._weights:
            weight.data = weight.data.clone()  # the backbone's own are not to change
            weight.requires_grad_()

    def fit(self, round: int, clients: Sequence[str]) -> None:
        """One round of some clients, each counting the same."""
        start_W = nn.utils.parameters_to_vector(self._weights).detach().clone()
        total_W = torch.zeros_like(start_W, dtype=torch.float64)
        for client in sorted(clients):
            nn.utils.vector_to_parameters(start_W, self._weights)
            self._train(round, client)
            total_W += nn.utils.parameters_to_vector(self._weights).detach()
        nn.utils.vector_to_parameters((total_W / len(clients)).float(), self._weights)

    @torch.no_grad()
    def test(self) -> dict[str, Score]:
        """Each client's scores on the test split, of `evaluation.max_users` users at most."""
        scores = {}
        for client in self._world.seats:
            reader, scorer = self._open(client)
            evaluator = Evaluator(len(self._world.catalogue.vectors_Id))
            for batch, seen, truth in reader.held_out(2, self._config.evaluation.max_users):
                scores_NI = self._score(batch, scorer, train=False)
                evaluator.add(scores_NI, seen, truth)
            scores[client] = evaluator.score()
        return scores

    def _train(self, round: int, client: str) -> None:
        rule = self._config.train
        optimizer = torch.optim.AdamW(
            self._weights,
            lr=self._learning_rate,
            betas=(rule.beta1, rule.beta2),
            eps=rule.eps,
            weight_decay=rule.weight_decay,
        )
        reader, scorer = self._open(client)
        for batch, target_N in reader.steps(round):
            optimizer.zero_grad()
            scores_NI = self._score(batch, scorer, train=True)
            mean_losses(scores_NI, target_N, batch.slot_N, 1).sum().backward()
            optimizer.step()

    def _score(self, batch: Batch, scorer: Scorer, train: bool) -> Tensor:
        """Of all items [N, I]."""

        def cross(h_Ld: Tensor) -> Tensor:
            return run_trunk(self._trunk, batch.rows, h_Ld)

        u_Nd, _ = self._tower.encode(batch.rows, batch.ids_L, batch.slot_N, cross, train)
        return scorer.score(u_Nd, batch.shard_N)

    def _open(self, client: str) -> tuple[Reader, Scorer]:
        shards = [self._data.shard(own) for own in self._world.seats[client]]
        model, catalogue = self._config.model, self._world.catalogue
        reader = Reader(self._config, catalogue.tokens, {client: shards})
        return reader, Scorer(catalogue.vectors_Id, shards, model.temperature, model.prior)
