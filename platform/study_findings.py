"""What a study found: the first lines of its page, who does not win first.

It must not know how runs came about, nor how tables look.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from fellray.platform.contrast import Contrast, contrast
from fellray.platform.orientation_rows import Central, tell_central
from fellray.platform.study import Part, Trial
from fellray.platform.study_values import LOWEST, read_values
from fellray.platform.words import BASELINES, name_metric

Summary = Mapping[str, Any]
Results = Mapping[tuple[str, str], Mapping[Trial, Summary]]
"""(set, arm) -> its trials, one per seed in the study's order, and what became of them."""
ROWS = (*BASELINES, "embedding_only")
"""Rows that arms are read beside."""
SURE = 0.05
"""Below it a p value, adjusted, counts as a difference."""


def find(parts: tuple[Part, ...], results: Results, central: Mapping[str, Central]) -> list[str]:
    """One line on all tables, then one for each."""
    tables = [(part, name) for part in parts for name in part.sets]
    lines, told = [], list[Central]()
    for part, name in tables:
        rows = central.get(name, {})
        lines.append(_find_one(part, name, results, {} if rows in told else rows))
        told.append(rows)  # once for each set, and for sets on the same data
    return [_sum_up(tables, results), *lines]


def contrasts(part: Part, name: str, results: Results) -> dict[str, Contrast]:
    """Every other arm of a table against its first."""
    runs = {arm: list(results[name, arm].values()) for arm in part.arms}
    first = runs.pop(part.first)
    return contrast(first, runs, part.metric)


def mean_of(trials: Mapping[Trial, Summary], metric: str) -> float:
    """Over seeds; NaN where runs have no such value."""
    values = read_values(trials.values(), metric)
    return fmean(values) if values else float("nan")


def _sum_up(tables: list[tuple[Part, str]], results: Results) -> str:
    leads, behind, beaten, ahead = [], [], [], 0
    for part, name in tables:
        others = contrasts(part, name, results)
        if not others:
            continue
        title = f"{part.title}, {name}"
        if all(other.difference < 0 for other in others.values()):
            leads.append(title)
            ahead += all(_sure(other) for other in others.values())
        else:
            behind.append(title)
        beaten += [title for other in others.values() if other.difference > 0 and _sure(other)][:1]
    told = (
        f"The first arm of a table has the highest mean in {len(leads)} of "
        f"{len(leads) + len(behind)} tables, in {ahead} of them with p < {SURE} against every "
        "other arm."
    )
    told += f" **It does not win in: {'; '.join(behind)}.**" if behind else ""
    return told + (
        f" An arm is above it with p < {SURE} in: {'; '.join(beaten)}." if beaten else ""
    )


def _find_one(part: Part, name: str, results: Results, central: Central) -> str:
    metric, champion = part.metric, part.first
    means = {arm: mean_of(results[name, arm], metric) for arm in part.arms}
    others = contrasts(part, name, results)
    line = f"**{part.title}, {name}**, {name_metric(metric)}: "
    if not others:
        return f"{line}`{champion}` {means[champion]:.4f}, alone in its table."
    best = max(others, key=lambda arm: means[arm])
    verb = "has the highest mean" if means[champion] > means[best] else "does not win"
    line += (
        f"`{champion}` {verb}: {means[champion]:.4f}, `{best}` {means[best]:.4f} (above it: "
        f"{others[best].told}; p {others[best].p:.2f})."
    )
    sure = [arm for arm, other in others.items() if _sure(other)]
    for word, sign in (("Below", -1), ("Above", 1)):
        if told := [arm for arm in sure if others[arm].difference * sign > 0]:
            line += f" {word} it with p < {SURE}: {_quote(told)}."
    if (lowest := others[best].lowest) > SURE:
        line += f" So few clients or seeds cannot tell arms apart: p is {lowest:.2g} at least."
    elif not sure:
        line += " No arm differs from it by more than chance may bring."
    return (
        line
        + _find_balance(part, name, results)
        + _find_baseline(part, name, results)
        + tell_central(central, metric, list(means.values()))
    )


def _sure(other: Contrast) -> bool:
    return other.p < SURE


def _find_balance(part: Part, name: str, results: Results) -> str:
    lowest = {arm: mean_of(results[name, arm], LOWEST) for arm in part.arms}
    if any(value != value for value in lowest.values()):
        return ""
    best = max(lowest, key=lambda arm: lowest[arm])
    own = lowest[part.first]
    if best == part.first:
        return f" The mean of its lowest client is the highest, {own:.4f}."
    return f" Its lowest client has {own:.4f}, with `{best}` {lowest[best]:.4f}."


def _find_baseline(part: Part, name: str, results: Results) -> str:
    summary = next(iter(results[name, part.first].values()))
    metric = part.metric
    rows = {row: summary[row][metric] for row in ROWS if metric in summary.get(row, {})}
    if not rows:
        return ""
    best = max(rows, key=lambda row: rows[row])
    words = f"{best.replace('_', ' ')} ({rows[best]:.4f})"
    below = [arm for arm in part.arms if mean_of(results[name, arm], metric) <= rows[best]]
    if not below:
        which = "beside them" if "embedding_only" in rows else "without training"
        return f" All are above the rows {which} ({best.replace('_', ' ')} {rows[best]:.4f})."
    return f" Not above {words}: {_quote(below)}."


def _quote(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
