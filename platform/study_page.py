"""The Markdown page of a study: what was found first, then tables, then every command.

Takes summaries as runs write them and gives a string; same input, same bytes. It must not know how
runs came about, nor read or write a file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from fellray.platform.config import RunConfig
from fellray.platform.orientation_rows import (
    EXPLAINED,
    Central,
    digest_central,
    list_values,
    tell_choice,
)
from fellray.platform.study import DataSet, Part, Study, Trial, list_arms
from fellray.platform.study_findings import ROWS, Results, Summary, contrasts, find
from fellray.platform.study_values import LOWEST, read_values
from fellray.platform.words import name_metric


def render_study(
    study: Study,
    results: Results,
    plots: Mapping[tuple[str, str], str],
    configs: Mapping[str, RunConfig],
    dropped: Mapping[Trial, Summary] | None = None,
    central: Mapping[str, Central] | None = None,
) -> str:
    """The page.

    Args:
        plots: (part's title, set) -> where its plot lies, as the page is to link it.
        configs: set -> what its arms begin with.
        dropped: tries that tuning did not keep.
        central: set -> its rows for orientation, where there are any.
    """
    central = central or {}
    parts = [
        f"# {study.study.capitalize()}",
        "## What was found",
        "\n".join(f"- {line}" for line in find(study.parts, results, central)),
        "## How to read it",
        _tell_origin(study),
        "\n".join(
            _describe(name, study.sets[name], configs[name], results)
            for name in dict.fromkeys(name for part in study.parts for name in part.sets)
        ),
    ]
    for part in study.parts:
        parts += [f"## {part.title}", part.note]
        for name in part.sets:
            parts += [
                f"### {name}",
                _tabulate(part, name, results, central.get(name, {})),
                f"![arms on {name} by two values]({plots[part.title, name]})"
                if (part.title, name) in plots
                else "",
            ]
    if central:
        parts.append(EXPLAINED)
    parts += ["## Every run", _list_runs(study, results, dropped or {}, central)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _tell_origin(study: Study) -> str:
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
    lines = [
        "Written by `fellray compare`; the command of every run is at the end. "
        + " ".join(filter(None, (tuned, study.budget))),
        "",
        f"- Values are of the test split: mean ± standard deviation over seeds {seeds}. In a plot "
        "a dot is the mean, its lines go from the lowest seed to the highest.",
        "- Lowest client: the value of the client that fares worst. CV: standard deviation of the "
        "clients' values over their mean, 0 if all are served alike.",
        "- Difference: an arm's mean minus the first arm's. Above it: in how many seeds, and at "
        "how many clients in the mean over seeds, the arm is above the first.",
        "- p: the difference under random signs of the clients' parts of it (of the seeds' where "
        "runs tell no client's value), adjusted for the arms of a table (Holm). With n of them it "
        "cannot be below 2^(1-n): where clients are few, read how often an arm is above.",
    ]
    return "\n".join(lines)


def _tell_grid(grid: Mapping[str, Sequence[object]]) -> str:
    tried = (f"`{key}` of {', '.join(map(str, values))}" for key, values in grid.items())
    return " and ".join(tried) or "nothing"


def _describe(name: str, own: DataSet, config: RunConfig, results: Results) -> str:
    """A set in a sentence or two: what it holds, how its arms train, how it is made."""
    runs = (trials for (where, _), trials in results.items() if where == name)
    summary = next(iter(next(runs).values()))
    counts = summary.get("data", {}).get("counts", {})
    held = [f"{counts[key]:,} {key}" for key in ("users", "items", "interactions") if key in counts]
    held.append(f"{summary['clients']:,} clients")
    train, step = config.train, config.evaluation.every
    every = f"every {_ordinal(step)} validated" if step > 1 else "each validated"
    told = [f"- **{name}**: {', '.join(held)}; {train.rounds} rounds, {every}, the best kept."]
    if config.attributes is None:
        told.append(
            f"{train.local_samples} histories of each client a round; the test ranks all items."
        )
    told += [own.note.strip(), f"`{own.prepare}`" if own.prepare else ""]
    return " ".join(filter(None, told))


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third", 4: "fourth"}.get(number, f"{number}th")


def _tabulate(part: Part, name: str, results: Results, central: Central) -> str:
    named = {metric: name_metric(metric) for metric in (part.metric, *part.columns)}
    named |= {LOWEST: "lowest client", "balance/cv": "CV"}
    runs = [summary for arm in part.arms for summary in results[name, arm].values()]
    shown = [metric for metric in named if read_values(runs, metric)]
    keys = {
        change.partition("=")[0]: None
        for arm in part.arms
        for change in next(iter(results[name, arm])).tuned
    }
    tuned = ", ".join(f"`{key.rpartition('.')[2]}`" for key in keys)
    heads = [named[metric] for metric in shown]
    heads += ["difference", "above it", "p", *([tuned] if keys else []), "MB a client and round"]
    rows = [["", *heads], ["---", *["--:"] * len(heads)]]
    empty = [""] * (4 + bool(keys))
    summary = next(iter(results[name, part.first].values()))
    for row in ROWS:
        if part.metric in summary.get(row, {}):
            cells = [_number(summary[row].get(metric)) for metric in shown]
            rows.append([row.replace("_", " "), *cells, *empty])
    for row, found in central.items():
        spread = [_spread(list_values(found, metric)) for metric in shown]
        chosen = [tell_choice(found)] if keys else []
        rows.append([row, *spread, "", "", "", *chosen, ""])
    others = contrasts(part, name, results)
    for arm in part.arms:
        trials = results[name, arm]
        spread = [_spread(read_values(trials.values(), metric)) for metric in shown]
        told = ["", "", ""]
        if arm in others:
            other = others[arm]
            told = [f"{other.difference:+.4f}", other.told, f"{other.p:.3f}"]
        own = [change.rpartition("=")[2] for change in next(iter(trials)).tuned]
        chosen = [", ".join(own)] if keys else []
        sent = fmean(_sent(own) for own in trials.values()) / 1e6
        megabytes = f"{sent:.1f}" if sent >= 0.1 else f"{sent:.2g}"
        rows.append([f"`{arm}`", *spread, *told, *chosen, megabytes])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _sent(summary: Summary) -> float:
    """Bytes of one client's round, without evaluation."""
    kinds = summary["bytes"].items()
    count = sum(size for kind, size in kinds if not kind.startswith("evaluation"))
    return float(count / max(1, summary["clients"]) / max(1, summary["rounds"]))


def _list_runs(
    study: Study,
    results: Results,
    dropped: Mapping[Trial, Summary],
    central: Mapping[str, Central],
) -> str:
    lines = [
        "<details><summary>Commands, a hash over all clients' adapters, and what the run came to "
        "on validation</summary>",
        "",
    ]
    lines += ["| hash | validation | command |", "|---|--:|---|"]
    metrics = {(name, arm): part.metric for name, arm, part in list_arms(study)}

    def tell(trial: Trial, summary: Summary, note: str = "") -> str:
        value = summary["validation"].get(metrics[trial.set, trial.arm])
        return f"| `{digest(summary)}` | {_number(value)}{note} | `{trial.command}` |"

    for trials in results.values():
        lines += [tell(trial, summary) for trial, summary in trials.items()]
    lines += [tell(trial, summary, ", not kept") for trial, summary in dropped.items()]
    commands = {
        found["command"]: digest_central(found)
        for rows in central.values()
        for found in rows.values()
    }
    lines += [f"| `{digits}` | | `{command}` |" for command, digits in commands.items()]
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
