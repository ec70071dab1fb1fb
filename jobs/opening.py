"""The beginning of a run: its folder, its Ray, its actors, and what a person sees of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from fellray.actors.plant import Plant
from fellray.actors.session import connect
from fellray.actors.world import World, survey
from fellray.jobs.display import Display
from fellray.jobs.plan import settle
from fellray.platform.config import RunConfig
from fellray.platform.outcome import Outcome
from fellray.platform.run import Run, open_run
from fellray.platform.seating import deal

VALIDATION = 1


@contextmanager
def open_plant(config: RunConfig) -> Iterator[tuple[Run, Plant, World, Display]]:
    """Everything that the rounds of a run need; all of it ends with the block.

    Raises:
        FellrayError: as `survey`, `open_run` and `Plant.on_ray`.
    """
    world = survey(config)
    config = settle(config, world)
    with (
        open_run(config, world.data_sha256) as run,
        connect(config, len(deal(list(world.seats), config.clients.together))),
        Plant.on_ray(config, world, run.rounds) as plant,
        Display(config, str(run.storage), run.to_go(), run.events) as display,
    ):
        if (t := run.without_row()) is not None:  # another run's state, on this one's data
            scores = plant.replayed(Plant.evaluate, t, VALIDATION, config.evaluation.max_users)
            ledger, events = plant.close_ledger(), plant.take_events()
            display.show(run.record(t, Outcome((), scores), ledger, events))
        yield run, plant, world, display
