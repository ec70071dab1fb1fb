"""Answers: what the updates of a round's client actors say, which of them count, whose is refused.

It must not know what an update's weights are for, nor where actors are.

Shapes: C learners, P parameters of one.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fellray.platform.messages import Update


@dataclass(frozen=True)
class Answers:
    """Of all learners who count; rows of their weights are in the order of `learners`."""

    learners: list[str]
    losses: dict[str, float]
    """Each learner's mean training loss."""
    samples: dict[str, int]
    """Histories that each learner read."""
    refused: dict[str, str]
    """Whose round cannot be used, and why."""

    @property
    def accepted(self) -> list[str]:
        """Whose round can be used."""
        return [learner for learner in self.learners if learner not in self.refused]

    def refuse(self, usable: Sequence[bool], why: str) -> None:
        """Those of the learners who are not usable, unless there is a reason already."""
        for learner, is_usable in zip(self.learners, usable, strict=True):
            if not is_usable:
                self.refused.setdefault(learner, why)

    def name_refused(self, round: int) -> list[str]:
        """In words."""
        return [f"round {round}: {c} refused: {why}" for c, why in sorted(self.refused.items())]

    def select(self, theta_CP: Tensor) -> Tensor:
        """The rows of those who are accepted."""
        if not self.refused:
            return theta_CP
        return theta_CP[[i for i, c in enumerate(self.learners) if c not in self.refused]]


def read_updates(updates: Sequence[Update]) -> Answers:
    """What they say beside the weights."""
    return Answers(
        [c for update in updates for c in update.clients],
        {c: loss for u in updates for c, loss in zip(u.clients, u.losses, strict=True)},
        {c: n for u in updates for c, n in zip(u.clients, u.samples, strict=True)},
        {c: why for update in updates for c, why in update.refused.items()},
    )


def take_on_time(
    updates: Sequence[Update], asked: Sequence[str], wanted: int | None
) -> tuple[list[Update], tuple[str, ...]]:
    """The first answers, as many as wanted, and who of those asked is not among them."""
    came = sorted((s, c) for u in updates for c, s in zip(u.clients, u.seconds, strict=True))
    counted = {client for _, client in came[:wanted]}
    late = tuple(c for c in asked if c not in counted)
    return ([_without(update, counted) for update in updates] if late else list(updates)), late


def _without(update: Update, counted: Collection[str]) -> Update:
    rows = [i for i, c in enumerate(update.clients) if c in counted]
    return replace(
        update,
        clients=tuple(update.clients[i] for i in rows),
        theta_SP=update.theta_SP[rows],
        losses=tuple(update.losses[i] for i in rows),
        samples=tuple(update.samples[i] for i in rows),
        seconds=tuple(update.seconds[i] for i in rows),
        refused={c: why for c, why in update.refused.items() if c in counted},
    )
