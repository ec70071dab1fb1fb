"""Compare: several methods on the same data and seeds, each a run of its own, set side by side."""

import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fellray.actors.session import connect
from fellray.actors.world import survey
from fellray.jobs.display import console
from fellray.jobs.orientation import check_orientation, orient, tabulate_orientation
from fellray.jobs.plan import settle
from fellray.jobs.train import train
from fellray.platform import config as configs
from fellray.platform.comparison import render_comparison
from fellray.platform.config import RunConfig
from fellray.platform.journal import Journal
from fellray.platform.run import Run
from fellray.platform.seating import deal
from fellray.platform.storage import Storage
from fellray.platform.words import BASELINES

SHOWN = {
    "recall@10": "recall@10",
    "ndcg@10": "ndcg@10",
    "ndcg@20": "ndcg@20",
    "balance/min": "worst client's\nndcg@10",
    "balance/cv": "its CV over\nclients",
}
"""Metrics on the terminal, and what they are called there."""


def compare(
    config: RunConfig, methods: Sequence[str], seeds: Sequence[int], orientation: bool = False
) -> dict[str, Any]:
    """Train what is not trained yet; write `compare.json` and `compare.html`.

    The config's own method and seed keep the config's name; other runs are named after it.

    Args:
        orientation: also item-kNN, BPR-MF and SASRec on everybody's data in one place, each with
            one setting, as a method has.

    Returns:
        method -> metric -> {mean, std, values}, one value per seed; baseline rows included.
    """
    if orientation:
        check_orientation(config)
    world = survey(config)
    config = settle(config, world)
    runs = {(m, s): _variant(config, m, s) for m in methods for s in seeds}
    actors = len(deal(list(world.seats), config.clients.together))
    with connect(config, actors):
        summaries = {key: find_finished(run) or train(run) for key, run in runs.items()}
    rows: dict[str, list[dict[str, float]]] = {
        name: [summaries[methods[0], seed][name] for seed in seeds] for name in BASELINES
    }
    if orientation:
        rows |= tabulate_orientation(orient(config, tries=1, seeds=seeds))
    for method in methods:
        rows[method] = [
            summaries[method, s]["test"]
            | {f"balance/{k}": v for k, v in summaries[method, s]["balance"].items()}
            for s in seeds
        ]
    table = {name: _spread(values) for name, values in rows.items()}
    _write(config, table, summaries, seeds)
    return table


def show_comparison(table: dict[str, Any]) -> None:
    """The table on the terminal: mean and, with several seeds, standard deviation."""
    shown = Table("test", *SHOWN.values())
    for name, metrics in table.items():
        cells = []
        for metric in SHOWN:
            entry = metrics.get(metric)
            spread = f" ± {entry['std']:.4f}" if entry and len(entry["values"]) > 1 else ""
            cells.append(f"{entry['mean']:.4f}{spread}" if entry else "")
        shown.add_row(name, *cells)
    console.print(shown)


def _variant(config: RunConfig, method: str, seed: int) -> RunConfig:
    if method == config.method.kind and seed == config.seed:
        return config
    tree = config.model_dump(mode="json")
    if method != config.method.kind:
        tree["method"] = {"kind": method}
    tree |= {"seed": seed, "name": f"{config.name}-{method}-s{seed}"}
    return configs.parse(tree, f"method {method}")


def find_finished(config: RunConfig) -> dict[str, Any] | None:
    """The summary of a run that was trained to its end with this very config."""
    run = Run(config)
    if not run.is_finished():
        return None
    if run.storage.read("config.json").decode() != configs.dump(config):
        return None  # training it will say what differs
    summary: dict[str, Any] = json.loads(run.storage.read("summary.json"))
    return summary


def _spread(values: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation (0 for one seed) and the values themselves."""
    return {
        metric: {
            "mean": statistics.fmean(v[metric] for v in values),
            "std": statistics.stdev(v[metric] for v in values) if len(values) > 1 else 0.0,
            "values": [v[metric] for v in values],
        }
        for metric in values[0]
    }


def _write(
    config: RunConfig,
    table: dict[str, Any],
    summaries: dict[tuple[str, int], dict[str, Any]],
    seeds: Sequence[int],
) -> None:
    folder = Storage(config.storage).sub(f"{config.name}-compare")
    journal = Journal(folder)
    journal.write_json("compare.json", table)
    balances: dict[str, Any] = {}
    for (method, seed), summary in summaries.items():
        balances.setdefault(method, {})[str(seed)] = summary["balance"]
    counts = next(iter(summaries.values()))["data"]["counts"]
    tested: dict[str, list[str]] = {}
    for (method, _), summary in summaries.items():
        tested.setdefault(method, []).append(str(summary["best_round"]))
    best = "; ".join(f"{method} {', '.join(rounds)}" for method, rounds in tested.items())
    meta = {
        "name": config.name,
        "seeds": list(seeds),
        "rounds": config.train.rounds,
        "best round on validation, which is tested": best,
        **counts,
    }
    journal.write_text("compare.html", render_comparison(table, balances, meta))
    if own := summaries.get((config.method.kind, config.seed)):
        # the run everything was compared from carries the table too
        Run(config).journal.write_json("summary.json", own | {"compare": table})
    console.print(
        f"Best round on validation, which is tested, by seed: {best}", markup=False, soft_wrap=True
    )
    console.print(f"Written: {folder}/compare.json and compare.html")


def main() -> None:
    """`python jobs/compare.py CONFIG METHODS SEEDS [key=value ...]`, as `fellray compare`."""
    path, methods, seeds, *overrides = sys.argv[1:]
    config = configs.load(path, overrides)
    show_comparison(compare(config, methods.split(","), [int(s) for s in seeds.split(",")]))


if __name__ == "__main__":
    main()
