"""Promise 9: kill anything, resume, and the hashes are those of a run that nobody disturbed."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from driver import AGENTS, Driver, actors_below, wait_until

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.display import Display
from fellray.jobs.finish import finish
from fellray.jobs.train import one_round, train
from fellray.platform.config import RunConfig
from fellray.platform.rounds import Rounds
from fellray.platform.run import open_run
from fellray.platform.storage import Storage

pytestmark = pytest.mark.cluster
ROUNDS = 5
KEEP = 2
SETTINGS: dict[str, Any] = {
    # rounds long enough to be hit in the middle, and the shared adapter, which must roll back too
    "train": {"rounds": ROUNDS, "local_samples": 200, "batch_size": 4},
    "server": {"shared_adapter": True, "cpus": 1},
    "clients": {"per_actor": 3},
    "keep_last": KEEP,
}
SAME = (
    *("hashes", "final_hashes", "best_round", "rounds", "test", "validation", "per_client"),
    *("untrained", "balance", "popularity", "prior"),
)
"""What a disturbance must not change in summary.json: all but times, bytes and the events."""

Configure = Callable[..., RunConfig]
Launch = Callable[..., Driver]


@pytest.fixture(scope="module")
def undisturbed(tiny_config: Configure) -> dict[str, Any]:
    """The summary of the same run in one process."""
    config = tiny_config(**SETTINGS)
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        Plant.inline(config, world, run.rounds) as plant,
        Display(config, "", run.to_go()) as display,
    ):
        for t in run.to_go():
            outcome = plant.replayed(one_round, t, config)
            run.commit(t, outcome, plant.close_ledger(), plant.take_events())
        return finish(run, plant, world, display)


def folder_of(config: RunConfig) -> Storage:
    return Storage(config.storage).sub(config.name)


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    lines = folder_of(config).read("metrics.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def await_round(config: RunConfig, round: int, driver: Driver | None = None) -> None:
    """Return when a round is committed."""

    def committed() -> bool:
        if driver and not driver.running():
            raise AssertionError(f"the driver ended: {driver.text()}")
        return folder_of(config).exists(f"rounds/{round:06d}/manifest.json")

    wait_until(committed, 200, f"round {round} is committed")


def assert_same(config: RunConfig, undisturbed: dict[str, Any]) -> None:
    """The run on disk is the one that nobody disturbed, and tidy."""
    summary = json.loads(folder_of(config).read("summary.json"))
    assert {k: summary[k] for k in SAME} == {k: undisturbed[k] for k in SAME}
    rounds = Rounds(folder_of(config))
    last = set(range(ROUNDS + 1 - KEEP, ROUNDS + 1))
    assert set(rounds.committed()) == {0, summary["best_round"], *last}
    assert set(folder_of(config).list("rounds")) == {f"{n:06d}" for n in rounds.committed()}
    assert [row["round"] for row in rows_of(config)] == list(range(ROUNDS + 1))


def assert_free(config: RunConfig) -> None:
    """Nobody holds the run."""
    with folder_of(config).lock("train"):
        pass


class Striker(threading.Thread):
    """Kills the first living actor of a class some time after a round was committed."""

    def __init__(self, config: RunConfig, name: str, after_round: int, delay_s: float):
        super().__init__(daemon=True)
        self._plan = (config, name, after_round, delay_s)
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        config, name, after_round, delay_s = self._plan
        try:
            await_round(config, after_round)
            time.sleep(delay_s)
            actors_below(psutil.Process(), name)[0].kill()
        except BaseException as failure:
            self.failure = failure

    def done(self) -> None:
        """It struck."""
        self.join()
        assert self.failure is None, repr(self.failure)


def test_a_client_and_the_server_are_killed_in_the_middle(
    tiny_config: Configure, undisturbed: dict[str, Any], local_ray: None
) -> None:
    config = tiny_config(**SETTINGS)
    strikers = [Striker(config, "Client", 1, 0.15), Striker(config, "Server", 3, 0.15)]
    train(config)
    for striker in strikers:
        striker.done()
    events = {row["round"]: " ".join(row["events"]) for row in rows_of(config)}
    assert "fit on actor" in events[2]
    assert "lost and begun again" in events[2]
    assert "fit on actor" in events[4] or "the round was begun again" in events[4]
    assert_same(config, undisturbed)
    assert_free(config)


def test_the_driver_is_killed_and_interrupted(
    tiny_config: Configure,
    undisturbed: dict[str, Any],
    local_ray: None,
    launch: Launch,
    on_disk: Callable[[RunConfig], str],
) -> None:
    config = tiny_config(**SETTINGS)
    path = on_disk(config)

    killed = launch("-m", "fellray.jobs.cli", "train", path)
    await_round(config, 1, killed)
    time.sleep(0.15)
    killed.look()
    os.kill(killed.process.pid, signal.SIGKILL)
    assert killed.finish()[0] == -signal.SIGKILL
    assert killed.left(30, but=AGENTS) == []
    assert_free(config)

    interrupted = launch("jobs/train.py", path)
    await_round(config, 3, interrupted)
    time.sleep(0.15)
    os.kill(interrupted.process.pid, signal.SIGINT)
    status, out, err = interrupted.finish(60)
    assert status not in (0, 2), (out, err)
    assert interrupted.left(30) == []
    assert_free(config)
    assert "going on after round" in out

    train(config)
    assert_same(config, undisturbed)
    assert killed.left(90) == []
