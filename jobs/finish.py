"""The end of a run: the test at its best round, the summary, the report, the exported adapters."""

from collections.abc import Mapping
from typing import Any

from fellray.actors.plant import Plant
from fellray.actors.world import World
from fellray.jobs.display import Display
from fellray.platform.client_groups import describe_groups
from fellray.platform.peft_export import export
from fellray.platform.report import render
from fellray.platform.run import COSTS, Run
from fellray.platform.split import plan_cut
from fellray.platform.summary import summarise

VALIDATION, TEST = 1, 2
SPENT = 3
"""Exit status of a run that its privacy budget ended."""


def finish(run: Run, plant: Plant, world: World, display: Display) -> dict[str, Any]:
    """Test the best round, write `summary.json`, `report.html` and `adapters/`; the summary."""
    best = run.best_round()
    tell_stop(run, display)
    display.say(f"testing round {best}")
    summary = plant.replayed(_test, run, world, best)
    summary["model"]["generative"] = world.backbone.generative
    if world.groups:
        cut = plan_cut(world.backbone, run.config.model)
        summary["groups"] = describe_groups(run.config, world.groups, cut)
    events = plant.take_events()
    display.warn(events)
    summary["events"] += events
    display.say("writing the report")
    export(run, best, plant.learners)
    run.journal.write_json("summary.json", summary)
    write_report(run)
    return summary


def tell_stop(run: Run, display: Display) -> None:
    """Where its privacy budget ended the run, say so; the summary says it too."""
    if run.spending.stop:
        display.warn([run.spending.stop])
        run.events.append(run.spending.stop)


def exit_status(summary: Mapping[str, Any]) -> int:
    """0, or `SPENT`: the run is whole, but has fewer rounds than were asked for."""
    return 0 if summary["privacy"]["stopped_before"] is None else SPENT


def _test(plant: Plant, run: Run, world: World, best: int) -> dict[str, Any]:
    return summarise(
        run,
        learners=plant.learners,
        data={
            "path": str(run.config.data.path),
            "sha256": world.data_sha256,
            "counts": world.counts,
        },
        model_sha256=world.backbone.sha256,
        test=plant.replayed(Plant.evaluate, best, TEST),
        validation=plant.replayed(Plant.evaluate, best, VALIDATION),
        untrained=plant.replayed(Plant.evaluate, 0, TEST),
        baselines=plant.evaluate_baselines(TEST),
    )


def write_report(run: Run) -> None:
    """`report.html` of a finished run, with the client cost where it was measured."""
    page = render(
        run.read_json("summary.json"),
        run.journal.rows("metrics"),
        run.config.model_dump(mode="json"),
        run.read_json(COSTS) if run.storage.exists(COSTS) else None,
    )
    run.journal.write_text("report.html", page)
