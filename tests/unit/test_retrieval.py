"""Scores and losses by hand, and a row's bits whoever stands beside it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fellray.platform.retrieval import Scorer, mean_losses
from fellray.platform.shard import Shard


def shard(items: list[int], splits: list[int]) -> Shard:
    return Shard(
        "c",
        np.array([0]),
        np.array([0, len(items)]),
        np.array(items, np.int32),
        np.array(splits, np.uint8),
    )


SHARDS = [shard([0, 0, 0, 1, 2], [0, 0, 0, 1, 2]), shard([2, 1], [0, 0])]
VECTORS = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32)


def test_scores_by_hand() -> None:
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    scores = Scorer(VECTORS, SHARDS, 0.5, prior=True).score(u, torch.tensor([0, 1]))
    assert scores[0].tolist() == pytest.approx([2.0 + math.log(4), 0.0, 1.2]), "test counts hide"
    assert scores[1].tolist() == pytest.approx([0.0, 2.0 + math.log(2), 1.6 + math.log(2)])
    plain = Scorer(VECTORS, SHARDS, 0.5, prior=False).score(u, torch.tensor([0, 1]))
    assert plain.tolist() == [pytest.approx([2.0, 0.0, 1.2]), pytest.approx([0.0, 2.0, 1.6])]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_scores_do_not_depend_on_its_company(threads: int) -> None:
    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(0)
    items = F.normalize(torch.randn(431, 384, generator=draw), dim=1).numpy()
    u = F.normalize(torch.randn(67, 384, generator=draw), dim=1)
    everyone = shard([0], [0])
    scorer = Scorer(items, [everyone], 0.05, prior=True)
    together = scorer.score(u, torch.zeros(67, dtype=torch.int64))
    for start, stop in [(0, 1), (5, 7), (10, 27), (0, 33), (40, 67)]:
        alone = scorer.score(u[start:stop], torch.zeros(stop - start, dtype=torch.int64))
        assert torch.equal(alone, together[start:stop])


def test_mean_losses_by_hand() -> None:
    scores = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, math.log(3)]])
    losses = mean_losses(scores, torch.tensor([0, 1, 0]), torch.tensor([2, 0, 2]), 3)
    assert losses.tolist() == pytest.approx([math.log(4 / 3), 0.0, (math.log(2) + math.log(4)) / 2])


def test_each_learners_gradient_is_of_its_own_mean() -> None:
    draw = torch.Generator().manual_seed(1)
    scores, targets = torch.randn(5, 7, generator=draw), torch.tensor([0, 3, 6, 2, 2])
    slots = torch.tensor([0, 0, 1, 1, 1])
    together = scores.clone().requires_grad_()
    mean_losses(together, targets, slots, 2).sum().backward()
    for slot in range(2):
        alone = scores[slots == slot].clone().requires_grad_()
        F.cross_entropy(alone, targets[slots == slot]).backward()
        torch.testing.assert_close(together.grad[slots == slot], alone.grad)
