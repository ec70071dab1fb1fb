"""Train: one turn of the loop is one round of Algorithm 1."""

import sys
from typing import Any

from fellray.actors.attribute_plant import AttributePlant
from fellray.actors.plant import Plant
from fellray.actors.telemetry import RunTelemetry
from fellray.jobs.attributes import train_attributes
from fellray.jobs.display import Display
from fellray.jobs.finish import exit_status, finish
from fellray.jobs.opening import open_plant
from fellray.platform import config as configs
from fellray.platform.aggregation import reduce
from fellray.platform.config import RunConfig
from fellray.platform.outcome import Outcome
from fellray.platform.run import Run


def one_round(plant: Plant | AttributePlant, t: int, config: RunConfig) -> Outcome:
    """A pure function of the committed state of round t - 1."""
    if t == 0:
        return Outcome(plant.stage_start(), plant.validate(0))
    reports = plant.fit(t, plant.sample(t))  # local split training
    plan = config.method.plan(reports.meta)  # who listens to whom
    mixed = reduce(plan, reports.theta_CP, reports.blocks)  # everybody's own mixture
    return Outcome(plant.install(reports, plan, mixed), plant.validate(t), reports, plan)


def play(run: Run, plant: Plant | AttributePlant, display: Display) -> None:
    """Round after round, each committed before the next begins."""
    telemetry = RunTelemetry(run.config, plant.registered)
    for t in run.spending.affordable(run.to_go(), plant.sample):
        outcome = plant.replayed(one_round, t, run.config)
        row = run.commit(t, outcome, plant.close_ledger(), plant.take_events())
        display.show(row)
        telemetry.show(row)


def train(config: RunConfig) -> dict[str, Any]:
    """Train until the last round, from wherever an earlier try was interrupted; the summary."""
    if config.attributes is not None:
        return train_attributes(config, play)
    with open_plant(config) as (run, plant, world, display):
        play(run, plant, display)
        return finish(run, plant, world, display)


def main() -> int:
    """`python jobs/train.py CONFIG [key=value ...]`, also under `ray job submit`."""
    return exit_status(train(configs.load(sys.argv[1], sys.argv[2:])))


if __name__ == "__main__":
    sys.exit(main())
