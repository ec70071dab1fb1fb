"""Pre-training of the attribute backbone on open users, and its distillation to a smaller one.

Central training in one process. The epoch is chosen by the AUC on open users that training has not
seen; clients' samples play no part. This file must not know clients.

Shapes: N samples, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fellray.platform.attribute_model import Backbone, Shape, predict, start_backbone
from fellray.platform.attributes import AttributeConfig, Student
from fellray.platform.click_score import pool_clicks, score_users
from fellray.platform.errors import FellrayError


@dataclass(frozen=True)
class Samples:
    """Coded samples."""

    users_NF: Tensor
    items_NF: Tensor
    labels_N: Tensor
    """fp32"""
    user_N: Tensor
    """Whose they are, ascending."""

    def select(self, rows: Tensor) -> "Samples":
        """Some of them."""
        parts = (self.users_NF, self.items_NF, self.labels_N, self.user_N)
        return Samples(*(part[rows] for part in parts))


@dataclass(frozen=True)
class Fitted:
    """A trained backbone and how it came about."""

    backbone: Backbone
    epoch: int
    """The one that was kept, from 1."""
    held_out: dict[str, float]
    """Metrics on the open users that were kept out, at that epoch."""


def evaluate_backbone(backbone: Backbone, samples: Samples) -> dict[str, float]:
    """Metrics of a backbone as it is."""
    with torch.no_grad():
        logits = predict(backbone, samples.users_NF, samples.items_NF).numpy()
    users = int(samples.user_N.max()) + 1 if len(samples.user_N) else 0
    scores = score_users(logits, samples.labels_N.numpy(), samples.user_N.numpy(), users)
    return pool_clicks(scores).means()


def pretrain(
    config: AttributeConfig,
    shape: Shape,
    samples: Samples,
    seed: int,
    tell: Callable[[int, dict[str, float]], None] = lambda epoch, held_out: None,
) -> Fitted:
    """Fit a fresh backbone to the open users' clicks.

    Args:
        samples: of all open users; `config.open.held_out` of the users are kept out.
        tell: hears of every epoch.
    """
    return _fit(
        config,
        start_backbone(shape, torch.Generator().manual_seed(seed)),
        samples,
        seed,
        tell,
        lambda logits, rows: torch.nn.functional.binary_cross_entropy_with_logits(
            logits, samples.labels_N[rows]
        ),
    )


def distil(
    config: AttributeConfig,
    student: Student,
    teacher: Backbone,
    samples: Samples,
    seed: int,
    tell: Callable[[int, dict[str, float]], None] = lambda epoch, held_out: None,
) -> Fitted:
    """Fit a smaller backbone to the teacher's answers and to the clicks (see `Student`).

    Raises:
        FellrayError: the student is not smaller than its teacher.
    """
    shape = replace(teacher.shape, dim=student.dim, layers=student.layers)
    own, theirs = (s.count()["backbone"] for s in (shape, teacher.shape))
    if own >= theirs or shape.flops() > teacher.shape.flops():
        raise FellrayError(
            f"attributes.student: a student of dim {student.dim} and layers "
            f"{list(student.layers)} has {own:,} parameters and {shape.flops():,} FLOPs a sample, "
            f"its teacher {theirs:,} and {teacher.shape.flops():,}: give a smaller dim or layers"
        )
    with torch.no_grad():
        answers_N = predict(teacher, samples.users_NF, samples.items_NF)
    tau = student.temperature
    soft_N = torch.sigmoid(answers_N / tau)

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        hard = entropy(logits, samples.labels_N[rows])
        return (1 - student.alpha) * hard + student.alpha * tau**2 * entropy(
            logits / tau, soft_N[rows]
        )

    fresh = start_backbone(shape, torch.Generator().manual_seed(seed))
    return _fit(config, fresh, samples, seed, tell, loss)


def _fit(
    config: AttributeConfig,
    backbone: Backbone,
    samples: Samples,
    seed: int,
    tell: Callable[[int, dict[str, float]], None],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Fitted:
    users = samples.user_N.unique()
    draw = np.random.default_rng(seed)
    count = max(1, round(config.open.held_out * len(users)))
    kept = users[torch.from_numpy(draw.permutation(len(users))[:count].copy())]
    out_N = torch.isin(samples.user_N, kept)
    rows, held_out = (~out_N).nonzero()[:, 0], samples.select(out_N.nonzero()[:, 0])
    best: Fitted | None = None
    for parameter in backbone.parameters:
        parameter.requires_grad_()
    adam = torch.optim.Adam(backbone.parameters, config.learning_rate, foreach=False, fused=False)
    for epoch in range(1, config.epochs + 1):
        order = rows[torch.from_numpy(draw.permutation(len(rows)))]
        for batch in order.split(config.batch_size):
            adam.zero_grad()
            loss(
                predict(backbone, samples.users_NF[batch], samples.items_NF[batch]), batch
            ).backward()
            adam.step()
        found = evaluate_backbone(backbone, held_out)
        tell(epoch, found)
        if best is None or found.get("auc", 0.0) > best.held_out.get("auc", 0.0):
            best = Fitted(_copy(backbone), epoch, found)
    assert best is not None
    return best


def _copy(backbone: Backbone) -> Backbone:
    def copied(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t.detach().clone() for t in tensors)

    users, items, layers = (copied(t) for t in (backbone.users, backbone.items, backbone.layers))
    return Backbone(backbone.shape, users, items, layers, backbone.output.detach().clone())
