"""Dense retrieval: a history's vector against every item's, and what the client's own counts say.

score = cosine / temperature + log(1 + the item's count in this client's own training split). The
count prior is private to the client; without it a cosine cannot say "popular". The form is
RecFormer's (Li et al., KDD 2023) with a prior of ours.

Shapes: N rows, I items, d width, K shards (data owners) of one actor, S learners.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fellray.platform.shard import Shard

ROWS = 16
"""Rows of a matrix product are filled up to a multiple of this: fewer take kernels of their own."""


class Scorer:
    """The frozen item vectors and the count prior of each data owner."""

    def __init__(
        self,
        vectors_Id: np.ndarray | Tensor,
        shards: Sequence[Shard],
        temperature: float,
        prior: bool,
        device: torch.device | None = None,
    ):
        self._vectors_Id = from_dlpack(vectors_Id).to(device)
        self._temperature = temperature
        self._uses_prior = prior
        counts = [torch.from_numpy(shard.counts(len(vectors_Id))) for shard in shards]
        self.prior_KI = torch.stack(counts).float().log1p().to(device)

    def score(self, u_Nd: Tensor, shard_N: Tensor) -> Tensor:
        """Scores of all items [N, I] for unit vectors u."""
        scores = compare(u_Nd, self._vectors_Id, self._temperature)
        return scores + self.prior_KI[shard_N] if self._uses_prior else scores


def compare(u_Nd: Tensor, vectors_Id: Tensor, temperature: float) -> Tensor:
    """Scores of all items [N, I] before any prior, for unit vectors u."""
    n = len(u_Nd)
    filled = F.pad(u_Nd, (0, 0, 0, -n % ROWS))
    return (filled @ vectors_Id.T)[:n] / temperature


def mean_losses(scores_NI: Tensor, target_N: Tensor, slot_N: Tensor, num_slots: int) -> Tensor:
    """Each learner's mean cross-entropy over its rows [S], softmax over all items."""
    losses = F.cross_entropy(scores_NI, target_N, reduction="none")
    counts = torch.bincount(slot_N, minlength=num_slots).clamp(min=1)
    return losses.new_zeros(num_slots).index_add(0, slot_N, losses) / counts
