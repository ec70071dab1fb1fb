"""The Markdown page of a study: what was found first, then tables, then every command.

Takes summaries as runs write them and gives a string; same input, same bytes. It must not know how
runs came about, nor read or write a file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from fellray.platform.orientation_rows import (
    EXPLAINED,
    Central,
    digest_central,
    list_values,
    tell_central,
    tell_choice,
)
from fellray.platform.paired import adjust, weigh_signs
from fellray.platform.study import Part, Study, Trial
from fellray.platform.study_values import LOWEST, read_values
from fellray.platform.words import BASELINES, name_metric

Summary = Mapping[str, Any]
Results = Mapping[tuple[str, str], Mapping[Trial, Summary]]
"""(set, arm) -> its trials, one per seed in the study's order, and what became of them."""
_ROWS = (*BASELINES, "embedding_only")
"""Rows that arms are read beside."""
SURE = 0.05
"""Below it a p value, adjusted, counts as a difference."""


def render_study(
    study: Study,
    results: Results,
    plots: Mapping[tuple[str, str], str],
    central: Mapping[str, Central] | None = None,
) -> str:
    """The page.

    Args:
        plots: (part's title, set) -> where its plot lies, as the page is to link it.
        central: set -> its rows for orientation, where there are any.
    """
    central = central or {}
    parts = [
        f"# {study.study.capitalize()}",
        _tell_origin(study, results),
        "## What was found",
        "\n".join(f"- {line}" for part in study.parts for line in _find(part, results, central)),
    ]
    for part in study.parts:
        parts.append(f"## {part.title}")
        for name in part.sets:
            parts += [
                f"### {name}",
                _tabulate(part, name, results, central.get(name, {})),
                f"![arms on {name} by two values]({plots[part.title, name]})"
                if (part.title, name) in plots
                else "",
            ]
        parts.append(part.note)
    if central:
        parts.append(EXPLAINED)
    parts += ["## Every run", _list_runs(results, central)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _tell_origin(study: Study, results: Results) -> str:
    seeds = ", ".join(map(str, study.seeds))
    tuned = "Nothing was tuned."
    if study.tune:
        others = [f"`{arm}` {_tell_grid(grid)}" for arm, grid in study.tune_arms.items()]
        others += [
            f"on {name} {_tell_grid(own.tune)}"
            for name, own in study.sets.items()
            if own.tune is not None
        ]
        instead = f" (instead: {'; '.join(others)})" if others else ""
        tuned = (
            f"Every arm tried {_tell_grid(study.tune)} with seed {study.seeds[0]} and kept what "
            f"validated best{instead}."
        )
    return (
        f"Written by `fellray compare`. Seeds {seeds}: mean ± standard deviation. {tuned} "
        "CV: standard deviation of the clients' values over their mean, 0 if all are served alike. "
        "p: paired over clients and seeds by random signs, adjusted for the number of arms (Holm); "
        "one client under several seeds is not several clients, so p errs on the low side. "
        f"{_tell_pairs(study, results)}{study.budget}"
    ).strip()


def _tell_grid(grid: Mapping[str, Sequence[Any]]) -> str:
    tried = (f"`{key}` of {', '.join(map(str, values))}" for key, values in grid.items())
    return " and ".join(tried) or "nothing"


def _tell_pairs(study: Study, results: Results) -> str:
    """What p is where runs tell no client's value."""
    runs = (summary for trials in results.values() for summary in trials.values())
    if all(summary.get("per_client") for summary in runs):
        return ""
    return (
        "Runs on attributes tell no client's value: their p is paired over seeds alone, and with "
        f"{len(study.seeds)} of them cannot be below {2.0 ** (1 - len(study.seeds)):.3g}. "
    )


def _find(part: Part, results: Results, central: Mapping[str, Central]) -> list[str]:
    """Whether the champion leads, set by set."""
    lines = []
    for name in part.sets:
        means = {arm: _mean(results[name, arm], part.metric) for arm in part.arms}
        champion = part.first
        others = sorted((arm for arm in means if arm != champion), key=lambda arm: -means[arm])
        if not others:
            lines.append(f"{name}: `{champion}` {means[champion]:.4f}, alone in its table.")
            continue
        best = others[0]
        p = dict(zip(others, _test(part, name, others, results), strict=True))
        leads = means[champion] > means[best]
        apart = [arm for arm in others if p[arm] < SURE]
        worse = [arm for arm in apart if means[arm] < means[champion]]
        better = [arm for arm in apart if means[arm] > means[champion]]
        line = (
            f"{name}, {name_metric(part.metric)}: `{champion}` "
            f"{'has the highest mean' if leads else 'does not win'}: {means[champion]:.4f}, "
            f"`{best}` {means[best]:.4f} (p {p[best]:.2f})."
        )
        line += f" Told apart and below it: {_quote(worse)}." if worse else ""
        line += f" Told apart and above it: {_quote(better)}." if better else ""
        line += "" if apart else " No arm is told apart from it."
        lines.append(
            line
            + _find_balance(part, name, results)
            + _find_baseline(part, name, results)
            + tell_central(central.get(name, {}), part.metric, list(means.values()))
        )
    return lines


def _find_balance(part: Part, name: str, results: Results) -> str:
    lowest = {arm: _mean(results[name, arm], "balance/min") for arm in part.arms}
    if any(value != value for value in lowest.values()):
        return ""
    best = max(lowest, key=lambda arm: lowest[arm])
    own = lowest[part.first]
    if best == part.first:
        return f" Its lowest client fares best of all, {own:.4f}."
    return f" Its lowest client has {own:.4f}, with `{best}` {lowest[best]:.4f}."


def _find_baseline(part: Part, name: str, results: Results) -> str:
    summary = next(iter(results[name, part.first].values()))
    metric = part.metric
    rows = {row: summary[row][metric] for row in _ROWS if metric in summary.get(row, {})}
    if not rows:
        return ""
    best = max(rows, key=lambda row: rows[row])
    words = f"{best.replace('_', ' ')} ({rows[best]:.4f})"
    below = [arm for arm in part.arms if _mean(results[name, arm], metric) <= rows[best]]
    if not below:
        which = "beside them" if "embedding_only" in rows else "without training"
        return f" All are above the rows {which} ({best.replace('_', ' ')} {rows[best]:.4f})."
    return f" Not above {words}: {_quote(below)}."


def _tabulate(part: Part, name: str, results: Results, central: Central) -> str:
    named = {metric: name_metric(metric) for metric in (part.metric, *part.columns)}
    named |= {LOWEST: "lowest client", "balance/cv": "CV"}
    runs = [summary for arm in part.arms for summary in results[name, arm].values()]
    shown = [metric for metric in named if read_values(runs, metric)]
    heads = [named[metric] for metric in shown]
    heads += ["against the first", "p", "tuned", "MB a client and round"]
    rows = [["", *heads], ["---", *["--:"] * len(heads)]]
    summary = next(iter(results[name, part.first].values()))
    for row in _ROWS:
        if part.metric in summary.get(row, {}):
            cells = [_number(summary[row].get(metric)) for metric in shown]
            rows.append([row.replace("_", " "), *cells, "", "", "", ""])
    for row, found in central.items():
        spread = [_spread(list_values(found, metric)) for metric in shown]
        rows.append([row, *spread, "", "", tell_choice(found), ""])
    others = [arm for arm in part.arms if arm != part.first]
    p = dict(zip(others, _test(part, name, others, results), strict=True))
    base = _mean(results[name, part.first], part.metric)
    for arm in part.arms:
        trials = results[name, arm]
        spread = [_spread(_values(trials, metric)) for metric in shown]
        change = f"{_mean(trials, part.metric) - base:+.4f}" if arm in p else ""
        tuned = ", ".join(change.rpartition("=")[2] for change in next(iter(trials)).tuned)
        sent = fmean(_sent(own) for own in trials.values()) / 1e6
        test = f"{p[arm]:.3f}" if arm in p else ""
        megabytes = f"{sent:.1f}" if sent >= 0.1 else f"{sent:.2g}"
        rows.append([f"`{arm}`", *spread, change, test, tuned, megabytes])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _test(part: Part, name: str, others: Sequence[str], results: Results) -> list[float]:
    """Adjusted p of each arm against the first."""
    first = _pairs(results[name, part.first], part.metric)
    return adjust([weigh_signs(_pairs(results[name, arm], part.metric), first) for arm in others])


def _pairs(trials: Mapping[Trial, Summary], metric: str) -> list[float]:
    """A value for every client and seed; for every seed where clients have none."""
    values = [
        own[metric]
        for summary in trials.values()
        for _, own in sorted(summary.get("per_client", {}).items())
        if metric in own
    ]
    return values or _values(trials, metric)


def _values(trials: Mapping[Trial, Summary], metric: str) -> list[float]:
    return read_values(trials.values(), metric)


def _mean(trials: Mapping[Trial, Summary], metric: str) -> float:
    values = _values(trials, metric)
    return fmean(values) if values else float("nan")


def _sent(summary: Summary) -> float:
    """Bytes of one client's round, without evaluation."""
    kinds = summary["bytes"].items()
    count = sum(size for kind, size in kinds if not kind.startswith("evaluation"))
    return float(count / max(1, summary["clients"]) / max(1, summary["rounds"]))


def _list_runs(results: Results, central: Mapping[str, Central]) -> str:
    lines = ["<details><summary>Commands, and a hash over all clients' adapters</summary>", ""]
    lines += ["| hash | command |", "|---|---|"]
    met: set[str] = set()
    for trials in results.values():
        for trial, summary in trials.items():
            if trial.name not in met:
                met.add(trial.name)
                lines.append(f"| `{digest(summary)}` | `{trial.command}` |")
    for rows in central.values():
        for found in rows.values():
            lines.append(f"| `{digest_central(found)}` | `{found['command']}` |")
    return "\n".join([*lines, "", "</details>"])


def digest(summary: Summary) -> str:
    """Twelve digits that stand for what every client ended with."""
    told = json.dumps([summary["hashes"], summary.get("shared_hash")], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{fmean(values):.4f} ± {stdev(values):.4f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _quote(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
