"""What bench and cost compute around their clocks, and that their rival arms do the same work."""

from collections.abc import Callable

import numpy as np
import pytest

from fellray.actors.client import Client
from fellray.actors.server import make_host
from fellray.actors.world import survey
from fellray.jobs import cost, figures, measured
from fellray.jobs.released import Released
from fellray.jobs.timings import interleave, ratios, spread
from fellray.jobs.whole import Whole, tokens_per_step
from fellray.platform.config import RunConfig
from fellray.platform.in_process import InProcess
from fellray.platform.ledger import payload_bytes
from fellray.platform.messages import Lease
from fellray.platform.rounds import Rounds
from fellray.platform.storage import Storage


def test_spread_and_ratios_turn_by_turn() -> None:
    assert vars(spread([3.0, 1.0, 8.0])) == {"median": 3.0, "low": 1.0, "high": 8.0, "count": 3}
    # a machine that halves its speed in the second turn changes no ratio
    assert vars(ratios([2.0, 4.0, 3.0], [1.0, 2.0, 1.0])) == {
        "median": 2.0,
        "low": 2.0,
        "high": 3.0,
        "count": 3,
    }
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_arms_take_turns_and_change_places() -> None:
    called = ""

    def arm(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal called
            called += name

        return call

    taken = interleave({"a": arm("a"), "b": arm("b")}, 3)
    assert called == "ab" + "ab" + "ba" + "ab"
    assert [len(taken[n].wall) for n in "ab"] == [len(taken[n].cpu) for n in "ab"] == [3, 3]


@pytest.mark.parametrize(
    ("goal", "ratio", "met"),
    [
        (("<=", 1.35), 1.35, True),
        (("<=", 1.35), 1.36, False),
        ((">=", 3.0), 3.0, True),
        ((">=", 3.0), 2.9, False),
        (None, 2.0, None),
    ],
)
def test_goals(goal: tuple[str, float] | None, ratio: float, met: bool | None) -> None:
    assert figures.is_met(goal, ratio) is met


def test_bytes_of_three_protocols() -> None:
    table = figures.compare_bytes(400.0, adapters=10, weights=1000)
    assert table["bytes"] == {"split": 400.0, "LoRA FedAvg": 80.0, "full-model FedAvg": 8000.0}
    assert table["over_full_model"] == {
        "split": 0.05,
        "LoRA FedAvg": 0.01,
        "full-model FedAvg": 1.0,
    }


def test_made_up_messages_are_whole(tiny_config: Callable[..., RunConfig]) -> None:
    actors = [("a", "b"), ("c",)]
    sent = figures.make_messages(tiny_config(), Lease("life", 1), actors, 3, 16, 8)
    assert [a.clients for a, _ in sent] == actors
    assert [a.row_client_N.tolist() for a, _ in sent] == [[0, 0, 0, 1, 1, 1], [0, 0, 0]]
    for activation, gradient in sent:
        rows = len(activation.row_client_N)
        assert activation.lengths_N.tolist() == [16] * rows
        assert activation.h_Ld.shape == gradient.g_Ld.shape == (16 * rows, 8)
        assert payload_bytes(activation, gradient) == 2 * 16 * rows * 8 * 4 + 2 * 4 * rows
        assert not np.array_equal(activation.h_Ld, gradient.g_Ld)


def test_every_cut_or_a_stated_few() -> None:
    assert cost.choose_cuts(6, 1) == [0, 1, 2, 3, 4]
    assert cost.choose_cuts(2, 1) == [0]
    assert cost.choose_cuts(32, 1) == [0, 6, 12, 18, 24, 30]


def test_peak_memory_is_read_in_bytes() -> None:
    assert measured.read_peak("Name:\tpython\nVmPeak:\t  9 kB\nVmHWM:\t   2048 kB\n") == 2 << 20


def test_a_row_of_costs() -> None:
    steps = [measured.Step(wall, wall / 4, 100.0) for wall in (4.0, 8.0, 2.0)]
    row = cost.describe(steps, [70, 90, 80], [50, 30, 40])
    assert {name: value["median"] for name, value in row.items()} == {
        "peak_bytes": 80,
        "model_bytes": 40,
        "step_s": 4.0,
        "own_s": 3.0,
        "bytes": 100.0,
    }
    held = {"frozen": 1, "trained": 3}
    whole = cost.describe([measured.Step(2.0, 0.0, 0.0)], [120], [40]) | {"frozen": 4, "trained": 4}
    assert cost.compare_row(row | held, whole) == {
        "peak_bytes": 80 / 120,
        "model_bytes": 0.5,
        "step_s": 2.0,
        "own_s": 1.5,
        "frozen": 0.25,
        "trained": 0.75,
    }


def test_the_whole_model_is_the_split_one(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config()
    world = survey(config)
    learners = tuple(sorted(world.seats)[:3])
    rounds = Rounds(Storage(config.storage))
    host = make_host(config, learners, world.trunk_side(config), rounds)
    side = world.client_side(config)
    seats = {learner: (learner,) for learner in learners}
    client = Client(config, 0, seats, side, world.catalogue, InProcess(host), rounds)
    rounds.commit(0, [*host.stage_start(), *client.stage_start()], {})
    whole = Whole(config, learners, world.backbone, world.catalogue)
    losses = whole.fit(1), whole.fit(2), whole.fit(1)
    assert losses[0] == losses[2] != losses[1]
    assert losses[0] == client.fit(1, learners).losses
    alone = Whole(config, learners[1:2], world.backbone, world.catalogue)
    assert alone.fit(1) == losses[0][1:2], "who is beside it decides no bit"
    assert tokens_per_step(config, learners, world.catalogue) > 3 * config.train.batch_size


def test_the_released_order_trains_on_the_same(tiny_config: Callable[..., RunConfig]) -> None:
    """Other code, other padding, other rounding; the same samples from the same start."""
    config = tiny_config()
    world = survey(config)
    ours = Whole(config, sorted(world.seats), world.backbone, world.catalogue).fit(1)
    released = Released(config, world, threads=1)
    first = released.train_round(1)
    assert first == pytest.approx(ours, rel=1e-4)
    assert released.loading > 0
    assert released.train_round(2) != pytest.approx(first, rel=1e-4)


def test_merged_calls_are_measured_on_equal_bits(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config()
    figure = figures.measure_batching(config, survey(config), tokens=16, threads=1)
    assert figure["equal_bits"]
    assert figure["ratio"]["count"] >= figures.TURNS
    assert figure["ratio_cpu"] > 0
