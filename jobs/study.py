"""Study: every arm of a study on every set, tuned alike, over all seeds; then the page."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, TextColumn

from fellray.actors.attribute_world import AttributeWorld
from fellray.actors.session import connect
from fellray.jobs.compare import find_finished
from fellray.jobs.display import console, make_bar
from fellray.jobs.orientation import check_orientation, orient
from fellray.jobs.train import train
from fellray.platform import config as configs
from fellray.platform.click_data import MANIFEST, ClickData
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError, HeldError
from fellray.platform.journal import Journal
from fellray.platform.seating import deal
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.platform.study import (
    Study,
    Trial,
    choose,
    count_tries,
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
PATIENCE_S = 10.0
"""Between two looks at whether others have finished the runs that are left."""


def run_study(study: Study) -> Path:
    """Train what is not trained yet; write the page, its plots and `study.json`.

    Interrupted, it goes on where it was: finished runs are not trained again. Several processes, of
    one machine or of many on one storage, share the runs, and one of them writes the page.

    Returns:
        Where the page is.

    Raises:
        FellrayError: data of a set are not prepared, or a run fails; those before it are kept.
        HeldError: all is trained, and another process writes the page.
    """
    arms = list(list_arms(study))
    for name, arm, _ in arms:
        _refuse_unprepared(study, name, arm)
    for _, config in _list_ranking(study):
        check_orientation(config)
    runs = sum(len(list_tries(study, n, arm)) + len(study.seeds) - 1 for n, arm, _ in arms)
    config, actors = _find_largest(study)
    with (
        connect(config, actors),  # one Ray for all runs
        make_bar(MofNCompleteColumn(), TextColumn("runs of the study")) as bar,
    ):
        task = bar.add_task(study.study, total=runs)
        summaries: dict[Trial, dict[str, Any]] = {}

        def run(trial: Trial) -> dict[str, Any]:
            if trial not in summaries:
                summaries[trial] = _run(trial)
                bar.update(task, completed=len(summaries))
            return summaries[trial]

        results = _run_arms(study, run)
    kept = {trial for trials in results.values() for trial in trials}
    dropped = {trial: own for trial, own in summaries.items() if trial not in kept}
    with Storage(study.storage).sub(f"{study.study}-study").lock("page"):
        return _write(study, results, dropped, _orient(study))


def _run_arms(study: Study, run: Callable[[Trial], dict[str, Any]]) -> Results:
    """Every arm's best setting with every seed. What another process trains is left to it."""
    arms = list(list_arms(study))
    results: Results = {}
    while len(results) < len(arms):
        before = len(results)
        for name, arm, part in arms:
            if (name, arm) in results:
                continue
            with suppress(HeldError):
                tries = {trial: run(trial) for trial in list_tries(study, name, arm)}
                best = choose(tries, part.metric)
                rest = {trial: run(trial) for trial in list_seeds(study, best)[1:]}
                results[name, arm] = {best: tries[best]} | rest
        if len(results) == before:
            time.sleep(PATIENCE_S)
    return {(name, arm): results[name, arm] for name, arm, _ in arms}


def _configure(study: Study) -> dict[str, RunConfig]:
    """Set -> what its arms begin with."""
    return {name: configs.load(own.config, _place(study, name)) for name, own in study.sets.items()}


def _list_ranking(study: Study) -> list[tuple[str, RunConfig]]:
    """Sets that get rows for orientation, and the config of theirs; none if nobody asks."""
    if not study.orientation:
        return []
    return [(name, own) for name, own in _configure(study).items() if own.attributes is None]


def _place(study: Study, name: str) -> tuple[str, ...]:
    own = (f"name={study.study}-{name}", f"storage={study.storage}")
    return (*study.sets[name].set, *own)


def _orient(study: Study) -> dict[str, dict[str, Any]]:
    """Set -> row for orientation -> what was found; once for sets on the same data."""
    found: dict[Path, dict[str, Any]] = {}
    tries, seeds = count_tries(study), ",".join(map(str, study.seeds))
    ranking = _list_ranking(study)
    for name, config in ranking:
        if config.data.path in found:
            continue
        rows = orient(config, tries, study.seeds)
        start = ("python", "-m", "fellray.jobs.orientation", str(study.sets[name].config))
        asked = ("--tries", str(tries), "--seeds", seeds)
        found[config.data.path] = {
            row: result
            | {"command": shlex.join([*start, *asked, "--rows", row, *_place(study, name)])}
            for row, result in rows.items()
        }
    return {name: found[config.data.path] for name, config in ranking}


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
    try:
        return train(config)
    except HeldError:
        console.print("  another process trains it")
        raise


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


def _write(
    study: Study,
    results: Results,
    dropped: Mapping[Trial, dict[str, Any]],
    central: dict[str, dict[str, Any]],
) -> Path:
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
    told = render_study(study, results, plots, _configure(study), dropped, central)
    beside.write_text(page.name, told)
    _write_rows(study, results, dropped, central)
    return page


def _write_rows(
    study: Study,
    results: Mapping[tuple[str, str], Mapping[Trial, Any]],
    dropped: Mapping[Trial, dict[str, Any]],
    central: dict[str, dict[str, Any]],
) -> None:
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
            "kept": trial not in dropped,
        }
        for trials in (*results.values(), dropped)
        for trial, summary in trials.items()
    ]
    folder = Storage(study.storage).sub(f"{study.study}-study")
    told: dict[str, Any] = {"study": study.study, "rows": rows}
    if central:
        told["orientation"] = central
    Journal(folder).write_json("study.json", told)


def main() -> None:
    """`python jobs/study.py STUDY`, as `fellray compare STUDY`."""
    console.print(f"Written: {run_study(load_study(Path(sys.argv[1])))}")


if __name__ == "__main__":
    main()
