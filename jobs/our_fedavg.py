"""Our side's run of a rival's job: real actors, a committed round for each of theirs.

    python -m fellray.jobs.our_fedavg FOLDER      (writes FOLDER/ours.json and ours.safetensors)

Shapes: P parameters of one client.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from fellray.actors.plant import Plant
from fellray.actors.session import connect
from fellray.actors.world import survey
from fellray.jobs.rival_job import CONFIG, to_rival_order
from fellray.jobs.train import one_round
from fellray.platform import config as configs
from fellray.platform.rounds import Rounds
from fellray.platform.seating import deal
from fellray.platform.storage import Storage


def train_ours(folder: Path) -> None:
    """Train, then write the files."""
    config = configs.load(folder / CONFIG)
    facts: dict[str, Any] = json.loads((folder / "job.json").read_text("utf-8"))
    cohorts = facts["cohorts"]
    world = survey(config)
    losses, stamps = [], []
    with (
        tempfile.TemporaryDirectory() as storage,
        connect(config, len(deal(sorted(world.seats), config.clients.together))),
        Plant.on_ray(config, world, rounds := Rounds(Storage(storage))) as plant,
    ):
        rounds.commit(0, plant.stage_start(), {})
        stamps.append(time.perf_counter())
        for t in range(1, len(cohorts) + 1):
            outcome = plant.replayed(one_round, t, config)
            rounds.commit(t, outcome.staged, {})
            stamps.append(time.perf_counter())
            assert outcome.reports is not None
            assert outcome.reports.meta.clients == tuple(cohorts[t - 1]), "the job's cohort"
            losses.append(dict(outcome.reports.losses))
        held = rounds.load(len(cohorts), cohorts[-1][:1], ["client.values", "trunk.values"])
        ours_P = torch.cat([held["client.values"][0], held["trunk.values"][0]])
    theta_P = to_rival_order(config, world, ours_P).numpy()
    save_file({"theta_P": theta_P}, folder / "ours.safetensors")
    (folder / "ours.json").write_text(json.dumps({"losses": losses, "stamps": stamps}), "utf-8")


def main() -> None:
    """See above."""
    train_ours(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
