"""Promise 9: kill anything, resume, and the hashes are those of a run that nobody disturbed."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import pytest
from driver import AGENTS, Driver, actors_below, wait_until

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.display import Display
from fellray.jobs.finish import finish
from fellray.jobs.train import one_round, train
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.rounds import Rounds
from fellray.platform.run import open_run
from fellray.platform.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
ROUNDS = 5
KEEP = 2
SAME = (
    *("hashes", "final_hashes", "best_round", "rounds", "test", "validation", "per_client"),
    *("untrained", "balance", "popularity", "prior"),
)
"""What a disturbance must not change in summary.json: all but times, bytes and the events."""

Configure = Callable[..., RunConfig]
Launch = Callable[..., Driver]


def settings(per_actor: int, moments: str = "reset", engine: str = "torch") -> dict[str, Any]:
    """Rounds long enough to be hit in the middle; the shared adapter must roll back too."""
    # long tests hit up to 0.8 s after a round began
    samples = 120 if moments == "keep" else 48
    return {
        "train": {
            **{"rounds": ROUNDS, "local_samples": samples, "batch_size": 4},
            "moments": moments,
        },
        "server": {"shared_adapter": True, "engine": engine},
        "clients": {"per_actor": per_actor},
        "keep_last": KEEP,
    }


def run_in_one_process(config: RunConfig) -> dict[str, Any]:
    """The summary of a run without any actor."""
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


@pytest.fixture(scope="module")
def undisturbed(tiny_config: Configure) -> dict[str, Any]:
    """The summary of the run that nobody disturbs."""
    return run_in_one_process(tiny_config(**settings(per_actor=5)))


@pytest.fixture(scope="module")
def undisturbed_with_moments(tiny_config: Configure) -> dict[str, Any]:
    """The same where AdamW's moments stay, and so must survive too."""
    return run_in_one_process(tiny_config(**settings(per_actor=5, moments="keep")))


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
    """Kills the first living actor of each class some time after a round was committed."""

    def __init__(self, config: RunConfig, names: Sequence[str], after_round: int, delay_s: float):
        super().__init__(daemon=True)
        self._plan = (config, names, after_round, delay_s)
        self._failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        config, names, after_round, delay_s = self._plan
        try:
            await_round(config, after_round)
            time.sleep(delay_s)
            for victim in [actors_below(psutil.Process(), name)[0] for name in names]:
                victim.kill()
        except BaseException as failure:
            self._failure = failure

    def finish(self) -> None:
        """See that it struck."""
        self.join()
        assert self._failure is None, repr(self._failure)


def kill(driver: Driver, config: RunConfig) -> None:
    """SIGKILL to the driver alone; its Ray and its actors have to notice by themselves."""
    driver.look()
    os.kill(driver.process.pid, signal.SIGKILL)
    assert driver.finish()[0] == -signal.SIGKILL
    assert driver.left(30, but=AGENTS) == []
    assert_free(config)


def assert_in_the_middle(config: RunConfig) -> int:
    """The last round of a run that did not come to its end."""
    done = Rounds(folder_of(config)).latest()
    assert done is not None
    assert done < ROUNDS
    return done


def test_a_client_and_the_server_are_killed_in_the_middle(
    tiny_config: Configure, undisturbed: dict[str, Any], local_ray: None
) -> None:
    config = tiny_config(**settings(per_actor=3))
    strikers = [Striker(config, ["Client"], 1, 0.15), Striker(config, ["Server"], 3, 0.15)]
    train(config)
    for striker in strikers:
        striker.finish()
    events = {row["round"]: " ".join(row["events"]) for row in rows_of(config)}
    assert "fit on actor" in events[2]
    # once, however long the actor takes to be back
    assert events[2].count("lost and begun again") == 1
    assert "begun again" in events[4]
    assert events[0] == events[1] == ""
    assert_same(config, undisturbed)
    assert_free(config)


def test_the_driver_is_killed(
    tiny_config: Configure,
    undisturbed: dict[str, Any],
    local_ray: None,
    launch: Launch,
    on_disk: Callable[[RunConfig], str],
) -> None:
    config = tiny_config(**settings(per_actor=5))
    driver = launch("-m", "fellray.jobs.cli", "train", on_disk(config))
    wait_until(lambda: folder_of(config).exists("config.json"), 100, "the run is open")
    with pytest.raises(FellrayError, match=f"locked by process {driver.process.pid} "):
        train(config)
    await_round(config, 1, driver)
    time.sleep(0.15)
    kill(driver, config)
    assert_in_the_middle(config)

    train(config)
    assert_same(config, undisturbed)


@pytest.mark.long
def test_the_driver_is_interrupted(
    tiny_config: Configure,
    undisturbed: dict[str, Any],
    local_ray: None,
    launch: Launch,
    on_disk: Callable[[RunConfig], str],
) -> None:
    config = tiny_config(**settings(per_actor=5))
    driver = launch("-m", "fellray.jobs.cli", "train", on_disk(config))
    await_round(config, 1, driver)
    time.sleep(0.15)
    # Ctrl-C goes to everybody on the terminal
    os.killpg(driver.process.pid, signal.SIGINT)
    status, out, err = driver.finish(60)
    assert status not in (0, 2), (out, err)
    assert driver.left(30) == []
    assert_free(config)
    done = assert_in_the_middle(config)

    after = launch("-m", "fellray.jobs.cli", "train", on_disk(config))
    status, out, err = after.finish()
    assert status == 0, (out, err)
    assert f"going on after round {done}" in " ".join(out.split())
    assert_same(config, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("names", [["Client"], ["Server"], ["Client", "Server"]])
def test_actors_are_killed_at_any_time(
    names: list[str],
    seed: int,
    tiny_config: Configure,
    undisturbed_with_moments: dict[str, Any],
    local_ray: None,
) -> None:
    """Twice in a run, whatever they are doing."""
    draw = np.random.default_rng([seed, len(names), len(names[-1])])
    config = tiny_config(**settings(per_actor=2, moments="keep", engine="deepspeed"))
    strikers = [
        Striker(config, names, int(after_round), draw.uniform(0, 0.8))
        for after_round in draw.choice(ROUNDS, 2, replace=False)
    ]
    train(config)
    for striker in strikers:
        striker.finish()
    assert "begun again" in " ".join(e for row in rows_of(config) for e in row["events"])
    assert_same(config, undisturbed_with_moments)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_one_of_three_servers_is_killed_at_any_time(
    seed: int,
    tiny_config: Configure,
    undisturbed_with_moments: dict[str, Any],
    local_ray: None,
) -> None:
    """Its clients move to the others or wait for it, whichever is sooner; no bit tells."""
    draw = np.random.default_rng([seed, 3])
    made = settings(per_actor=1, moments="keep", engine="deepspeed")
    made["server"] |= {"count": 3, "cpus": 0.5}
    config = tiny_config(**made)
    striker = Striker(config, ["Server"], int(draw.integers(0, 3)), draw.uniform(0, 0.8))
    train(config)
    striker.finish()
    assert "begun again" in " ".join(e for row in rows_of(config) for e in row["events"])
    assert_same(config, undisturbed_with_moments)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_the_driver_is_killed_at_any_time(
    seed: int,
    tiny_config: Configure,
    undisturbed_with_moments: dict[str, Any],
    local_ray: None,
    launch: Launch,
    on_disk: Callable[[RunConfig], str],
) -> None:
    """Once while it starts, once in a round; then it is let alone."""
    draw = np.random.default_rng(seed)
    config = tiny_config(**settings(per_actor=2, moments="keep", engine="deepspeed"))
    path = on_disk(config)
    killed = [launch("jobs/train.py", path)]
    time.sleep(draw.uniform(0, 15))
    kill(killed[0], config)
    killed.append(launch("jobs/train.py", path))
    await_round(config, int(draw.integers(0, ROUNDS)), killed[1])
    time.sleep(draw.uniform(0, 0.8))
    kill(killed[1], config)
    train(config)
    assert_same(config, undisturbed_with_moments)
    assert [driver.left(90) for driver in killed] == [[], []]


# --- a disk that spoils a page -------------------------------------------------------------------


@pytest.mark.long
def test_actors_tell_of_a_damaged_page_and_the_driver_decides(
    tiny_config: Configure, local_ray: None
) -> None:
    """The server finds c0's trunk page spoilt; its client side goes back too."""
    config = tiny_config(
        method={"kind": "local"}, train={"rounds": 1}, clients={"per_actor": 2}, keep_last=9
    )
    train(config)
    path = "rounds/000001/trunk-00000.safetensors"
    data = bytearray(folder_of(config).read(path))
    data[8 + int.from_bytes(data[:8], "little") + 5] ^= 1
    folder_of(config).write(path, bytes(data))
    longer = config.model_copy(update={"train": config.train.model_copy(update={"rounds": 2})})
    train(longer)
    rounds = Rounds(folder_of(config))
    said = f"{path} is damaged: back goes client c0 to the start (round 0)"
    assert said in [event for row in rows_of(config) for event in row["events"]]
    names = ["client.values", "trunk.values"]
    start, last = (rounds.hashes(n, names, ["c0", "c1"]) for n in (0, 1))
    assert last["c0"] == start["c0"]
    assert last["c1"] != start["c1"]
    assert rounds.latest() == 2
