"""Study: every arm of a study on every set, tuned alike, over all seeds; then the page."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, TextColumn

from fellray.actors.attribute_world import AttributeWorld
from fellray.actors.session import connect
from fellray.jobs.compare import find_finished
from fellray.jobs.display import console, make_bar
from fellray.jobs.train import train
from fellray.platform.click_data import MANIFEST, ClickData
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.journal import Journal
from fellray.platform.seating import deal
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.platform.study import (
    Study,
    Trial,
    choose,
    list_arms,
    list_seeds,
    list_tries,
    load_study,
)
from fellray.platform.study_page import digest, render_study
from fellray.platform.study_plot import draw_arms
from fellray.platform.study_values import choose_height, name_height, read_values
from fellray.platform.words import name_metric

Results = dict[tuple[str, str], dict[Trial, dict[str, Any]]]


def run_study(study: Study) -> Path:
    """Train what is not trained yet; write the page, its plots and `study.json`.

    Interrupted, it goes on where it was: finished runs are not trained again.

    Returns:
        Where the page is.

    Raises:
        FellrayError: data of a set are not prepared, or a run fails; those before it are kept.
    """
    arms = list(list_arms(study))
    for name, arm, _ in arms:
        _refuse_unprepared(study, name, arm)
    runs = sum(len(list_tries(study, n, arm)) + len(study.seeds) - 1 for n, arm, _ in arms)
    results: Results = {}
    config, actors = _find_largest(study)
    with (
        connect(config, actors),  # one Ray for all runs
        make_bar(MofNCompleteColumn(), TextColumn("runs of the study")) as bar,
    ):
        task = bar.add_task(study.study, total=runs)

        def run(trial: Trial) -> dict[str, Any]:
            summary = _run(trial)
            bar.advance(task)
            return summary

        for name, arm, part in arms:
            tries = {trial: run(trial) for trial in list_tries(study, name, arm)}
            best = choose(tries, part.metric)
            rest = {trial: run(trial) for trial in list_seeds(study, best)[1:]}
            results[name, arm] = {best: tries[best]} | rest
    return _write(study, results)


def _find_largest(study: Study) -> tuple[RunConfig, int]:
    """The config that asks a Ray of its own for most CPUs, and how many client actors it has."""
    asked = {}
    for name, arm, _ in list_arms(study):
        config = list_tries(study, name, arm)[0].settle()
        actors = len(deal(_list_learners(config), config.clients.together))
        cpus = config.server.count * config.server.cpus + actors * config.clients.cpus
        asked[cpus] = config, actors
    return asked[max(asked)]


def _list_learners(config: RunConfig) -> list[str]:
    if config.attributes is not None:
        return list(ClickData(config.data.path).clients)
    return list(config.method.seat(Dataset(config.data.path).clients))


def _run(trial: Trial) -> dict[str, Any]:
    config = trial.settle()
    if (finished := find_finished(config)) is not None:
        return finished
    console.print(trial.command, soft_wrap=True)
    return train(config)


def _refuse_unprepared(study: Study, name: str, arm: str) -> None:
    config = list_tries(study, name, arm)[0].settle()
    manifest = "manifest.json" if config.attributes is None else MANIFEST
    if not (config.data.path / manifest).is_file():
        raise FellrayError(
            f"set {name!r}: {config.data.path} holds no prepared data; `fellray prepare "
            f"{study.sets[name].config}` makes it"
        )
    if config.attributes is not None:
        AttributeWorld(config)  # refuses what does not fit the data before hours are spent


def _write(study: Study, results: Results) -> Path:
    page = study.results
    beside = Journal(Storage(page.parent))
    plots: dict[tuple[str, str], str] = {}
    for index, part in enumerate(study.parts, start=1):
        for name in part.sets:
            found = {arm: results[name, arm].values() for arm in part.arms}
            up = choose_height(part.metric, [one for arm in found.values() for one in arm])
            if up is None:
                continue
            file = f"{page.stem}-{index}-{name}.svg"
            plot = draw_arms(
                f"{part.title}, {name}",
                {arm: read_values(found[arm], part.metric) for arm in part.arms},
                {arm: read_values(found[arm], up) for arm in part.arms},
                part.first,
                f"overall {name_metric(part.metric)}",
                name_height(up),
            )
            beside.write_text(file, plot)
            plots[part.title, name] = file
    beside.write_text(page.name, render_study(study, results, plots))
    _write_rows(study, results)
    return page


def _write_rows(study: Study, results: Mapping[tuple[str, str], Mapping[Trial, Any]]) -> None:
    rows = [
        {
            "set": trial.set,
            "arm": trial.arm,
            "seed": trial.seed,
            "tuned": list(trial.tuned),
            "command": trial.command,
            "hash": digest(summary),
            "run": summary["run"],
            "test": summary["test"],
            "validation": summary["validation"],
            "balance": summary.get("balance", {}),
            "bytes": summary["bytes"],
        }
        for trials in results.values()
        for trial, summary in trials.items()
    ]
    folder = Storage(study.storage).sub(f"{study.study}-study")
    Journal(folder).write_json("study.json", {"study": study.study, "rows": rows})


def main() -> None:
    """`python jobs/study.py STUDY`, as `fellray compare STUDY`."""
    console.print(f"Written: {run_study(load_study(Path(sys.argv[1])))}")


if __name__ == "__main__":
    main()
