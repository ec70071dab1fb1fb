"""Train: one turn of the loop is one round of Algorithm 1."""

import sys
from typing import Any

from fellray.actors.client import deal
from fellray.actors.plant import Plant
from fellray.actors.session import connect
from fellray.actors.telemetry import RunTelemetry
from fellray.actors.world import survey
from fellray.jobs.display import Display
from fellray.jobs.finish import exit_status, finish
from fellray.jobs.plan import settle
from fellray.platform import config as configs
from fellray.platform.aggregation import reduce
from fellray.platform.config import RunConfig
from fellray.platform.run import Outcome, open_run


def one_round(plant: Plant, t: int, config: RunConfig) -> Outcome:
    """A pure function of the committed state of round t - 1."""
    if t == 0:
        return Outcome(plant.stage_start(), plant.validate(0))
    reports = plant.fit(t, plant.sample(t))  # local split training
    plan = config.method.plan(reports.meta)  # who listens to whom
    mixed = reduce(plan, reports.theta_CP, reports.blocks)  # everybody's own mixture
    return Outcome(plant.install(reports, plan, mixed), plant.validate(t), reports, plan)


def train(config: RunConfig) -> dict[str, Any]:
    """Train until the last round, from wherever an earlier try was interrupted; the summary."""
    world = survey(config)
    config = settle(config, world)
    with (
        open_run(config, world.data_sha256) as run,
        connect(config, len(deal(list(world.seats), config.clients.together))),
        Plant.on_ray(config, world, run.rounds) as plant,
        Display(config, str(run.storage), run.to_go(), run.events) as display,
    ):
        telemetry = RunTelemetry(config)
        if (t := run.without_row()) is not None:  # another run's state, on this one's data
            scores = plant.replayed(Plant.evaluate, t, 1, config.evaluation.max_users)
            outcome = Outcome((), scores)
            display.show(run.record(t, outcome, plant.close_ledger(), plant.take_events()))
        for t in run.spending.affordable(run.to_go(), plant.sample):
            outcome = plant.replayed(one_round, t, config)
            row = run.commit(t, outcome, plant.close_ledger(), plant.take_events())
            display.show(row)
            telemetry.show(row)
        return finish(run, plant, world, display)


def main() -> int:
    """`python jobs/train.py CONFIG [key=value ...]`, also under `ray job submit`."""
    path, *overrides = sys.argv[1:]
    return exit_status(train(configs.load(path, overrides)))


if __name__ == "__main__":
    sys.exit(main())
