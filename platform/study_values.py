"""Values of a study's runs, as their summaries hold them, and what a plot sets them against.

It must not know pages, nor how a plot is drawn.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fellray.platform.metrics import CUTOFFS
from fellray.platform.words import CLICK_METRICS, HEADLINE, name_metric

RANKED = [f"{m}@{k}" for m in ("ndcg", "recall", "hit", "mrr", "coverage") for k in CUTOFFS]
"""Metrics of a ranking."""
MORE_IS_BETTER = ("auc", "gauc", "precision")
"""Metrics of clicks foretold by which arms can be chosen."""
LOWEST = "balance/min"
"""The lowest client's value of the headline metric."""


def read_values(summaries: Iterable[Mapping[str, Any]], metric: str) -> list[float]:
    """A summary's value, of its test or (`balance/min`) of a part of it, where it has one."""
    kind, slash, key = metric.partition("/")
    found = (
        summary.get(kind, {}).get(key) if slash else summary["test"].get(metric)
        for summary in summaries
    )
    return [float(value) for value in found if value is not None]


def choose_height(metric: str, summaries: Collection[Mapping[str, Any]]) -> str | None:
    """What stands upright in a plot of `metric`: how the lowest client fares.

    Runs on attributes tell no client's value: there it is how well users' own items are ranked.
    None where not all runs have either.
    """
    if len(read_values(summaries, metric)) < len(summaries):
        return None
    for upright in (LOWEST, "auc" if metric == "gauc" else "gauc"):
        if len(read_values(summaries, upright)) == len(summaries):
            return upright
    return None


def name_height(upright: str) -> str:
    """Its name for a reader."""
    return (
        f"{name_metric(HEADLINE)} of the lowest client"
        if upright == LOWEST
        else (f"{name_metric(upright)}, test")
    )


def refuse_metrics(metric: str, columns: Iterable[str], clicks: bool) -> str | None:
    """Why arms cannot be chosen by a metric, or a column not be shown; None where all is well.

    Args:
        clicks: whether runs foretell clicks instead of ranking items.
    """
    known = [*CLICK_METRICS] if clicks else RANKED
    asked = [metric, *(column for column in columns if not column.startswith("balance/"))]
    if stranger := next((one for one in asked if one not in known), None):
        return f"runs have no metric {stranger!r}; there are {', '.join(known)}"
    if clicks and metric not in MORE_IS_BETTER:
        choices = " or ".join(MORE_IS_BETTER)
        return f"arms are chosen by the highest {metric!r}, and more is not better; take {choices}"
    return None
