"""What a round came to, before it is committed, and the row of the records that tells it.

It must not know where records lie, nor when a round counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fellray.platform.aggregation import Plan, Reports
from fellray.platform.click_score import ClickScore
from fellray.platform.manifest import Staged
from fellray.platform.metrics import Score

BALANCED = "ndcg@10"
"""The metric whose spread over clients is reported."""


@dataclass(frozen=True)
class Outcome:
    """What a round came to, before it is committed."""

    staged: Sequence[Staged]
    validation: Mapping[str, Score] | Mapping[str, ClickScore] | None
    """Client -> scores, on attributes actor -> its clients' score; None in a round that is not
    validated."""
    reports: Reports | None = None
    """None in round 0, the start."""
    plan: Plan | None = None


def describe_outcome(outcome: Outcome) -> dict[str, Any]:
    """A round as a row: losses and weights of its learners, validation of its clients."""
    row: dict[str, Any] = {}
    reports, plan = outcome.reports, outcome.plan
    if reports and plan:
        finite = {c: loss if math.isfinite(loss) else None for c, loss in reports.losses.items()}
        counted = reports.meta.losses_C
        row |= {
            "loss": counted.mean().item() if counted.isfinite().all() and len(counted) else None,
            "losses": finite,
            "samples": reports.samples,
            "samples_per_second": round_seconds(reports.samples / reports.seconds),
            "refused": dict(reports.refused),
            "late": list(reports.late),
        }
        for name, values in {"own_weight": plan.own_weight_C, **plan.notes}.items():
            row[name] = dict(zip(reports.meta.clients, values.tolist(), strict=True))
    if outcome.validation is not None:
        row["validation"] = pool(outcome.validation)
        if ranked := {c: s for c, s in outcome.validation.items() if isinstance(s, Score)}:
            scored = {c: s.means()[BALANCED] for c, s in ranked.items() if s.users}
            row["validation_per_client"] = scored
            row["worst_ndcg@10"] = min(scored.values(), default=0.0)
    return row


def round_seconds(value: float) -> float:
    """Times and rates to the millisecond: more digits would be noise."""
    return round(value, 3)


def pool(scores: Mapping[str, Score] | Mapping[str, ClickScore]) -> dict[str, float]:
    """Metrics over all users of all clients; clients are added in the order of their ids."""
    first, *others = [scores[client] for client in sorted(scores)]
    summed: Any = first  # all are of one kind
    for other in others:
        summed = summed + other
    means: dict[str, float] = summed.means()
    return means
