"""Words for a reader: numbers as text, metrics by the names the field writes.

It must not know markup, nor where a number comes from.
"""

import math
from collections.abc import Iterable

BASELINES = {
    "popularity": "items in order of their count, for everybody alike",
    "prior": "each client's own count prior alone, without the language model",
    "untrained": "the model as it was before the first round",
}
"""Rows of a comparison that no training made, and what each is."""
ORIENTATION = {
    "item_knn": "item-based nearest neighbours by cosine, on everybody's data in one place",
    "bpr_mf": "matrix factors under BPR, on everybody's data in one place",
    "sasrec": "self-attention over the sequence of items, on everybody's data in one place",
}
"""Rows that are trained where all data lie together, which no method may do, and what each is."""
STATISTICS = {
    "mean": "mean of clients",
    "std": "standard deviation (population)",
    "cv": "standard deviation / mean",
    "min": "lowest client",
    "worst_decile": "mean of the lowest 10 %",
    "max_min": "highest minus lowest",
    "jain": "Jain index (1: all equal)",
}
"""Statistics of one metric over clients, as `metrics.balance` names them, and what each is."""
CROSSINGS = (
    "To the trunk go activations, in a step's backward pass once more (repeat) with the gradients "
    "of its outputs; back come outputs and the gradients of its inputs. Evaluation is counted "
    "apart. Adapters go up to the driver and, mixed, down again."
)
"""What the kinds of bytes that a client sends and receives are."""
CLICK_METRICS = {
    "auc": "over all samples pooled",
    "gauc": "each user's AUC, weighted by its samples",
    "log_loss": "mean over samples",
    "precision": "of clicks and of others at 0.5, weighted by how many there are",
    "calibration": "mean probability over the share of clicks, best is 1",
    "ece": "expected calibration error, ten bins",
}
"""Metrics of clicks foretold, as `ClickScore.means` names them, and what each is."""
CLICK_ROWS = {
    "embedding_only": "private user embeddings alone, nothing sent",
    "untrained": "the pre-trained start, before the first round",
}
"""Rows that a run on attributes is read beside, and what each is."""
HEADLINE = "ndcg@10"
"""The metric that stands for a run."""

_FAMILIES = ("ndcg", "recall", "hit", "mrr", "coverage")


def order_metrics(names: Iterable[str]) -> list[str]:
    """Metric names by family, then by cutoff; balance and anything else behind."""

    def place(name: str) -> tuple[int, int, str]:
        family, _, cutoff = name.partition("@")
        if family in _FAMILIES and cutoff.isdigit():
            return _FAMILIES.index(family), int(cutoff), ""
        statistic = name.removeprefix("balance/")
        known = list(STATISTICS)
        return len(_FAMILIES), known.index(statistic) if statistic in known else 99, name

    return sorted(names, key=place)


def name_metric(metric: str) -> str:
    """A metric's name as the field writes it."""
    family, at, cutoff = metric.partition("@")
    if metric.startswith("balance/"):
        return f"clients: {STATISTICS.get(metric.removeprefix('balance/'), metric)}"
    if metric in CLICK_METRICS and family not in ("auc", "gauc", "ece"):
        return family.replace("_", " ").capitalize()
    short = family in ("ndcg", "mrr", *CLICK_METRICS)
    return (family.upper() if short else family.capitalize()) + at + cutoff


def format_number(value: float | None, digits: int = 4) -> str:
    """A number with so many digits behind the point, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def format_count(number: int, noun: str) -> str:
    """How many there are of what: `1 client`, `1,200 clients`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_size(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(len(units) - 1, max(0, math.floor(math.log2(count) / 10))) if count >= 1 else 0
    return f"{count / 1024**power:,.{1 if power else 0}f} {units[power]}"
