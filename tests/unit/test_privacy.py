"""What leaves a client under privacy: the bound, the noise, and whose bits they are."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fellray.actors.client import Client
from fellray.actors.plant import Plant
from fellray.actors.pool import InlinePool
from fellray.actors.world import survey
from fellray.jobs import cli
from fellray.jobs.display import Display
from fellray.jobs.finish import SPENT, exit_status, finish
from fellray.jobs.train import one_round
from fellray.platform.accountant import Spending, compute_epsilon
from fellray.platform.config import RunConfig, parse
from fellray.platform.errors import FellrayError
from fellray.platform.messages import Update
from fellray.platform.own import read_own
from fellray.platform.privacy import clip_row, find_key, privatise, privatise_losses
from fellray.platform.privacy_config import GaussianNoise, NoPrivacy, PaperLikeNoise
from fellray.platform.run import Run, open_run
from fellray.platform.run_list import list_runs

Play = Callable[..., Any]
Make = Callable[..., RunConfig]
KEY = bytes(range(32))
NOISE = GaussianNoise(clip=0.5, sigma=2.0)
GAUSSIAN = {"kind": "gaussian", "clip": 0.05, "sigma": 0.5}
FEDAVG = {"kind": "fedavg"}


# --- the bound ----------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=40),
    st.floats(1e-6, 1e6),
)
def test_a_clipped_row_is_never_longer_than_the_bound(numbers: list[float], bound: float) -> None:
    row = np.array(numbers)
    clipped = clip_row(row, bound)
    assert sum(Fraction(x) ** 2 for x in clipped.tolist()) <= Fraction(bound) ** 2
    if math.fsum(x * x for x in numbers) < bound * bound * 0.99:
        assert np.array_equal(clipped, row)


def test_clipping_keeps_the_direction() -> None:
    clipped = clip_row(np.array([3.0, -4.0]), 1.0)
    assert clipped == pytest.approx([0.6, -0.8], rel=1e-11)


def test_what_is_sent_is_the_clipped_row_plus_noise_of_the_stated_size() -> None:
    wide = torch.full((1, 40_000), 7.0)
    deviation = 1.0  # sigma * clip
    noise = privatise(wide, NOISE, KEY, 1, ["a"]).double().numpy()[0] - 0.5 / math.sqrt(40_000)
    assert abs(noise.mean()) < 5 * deviation / math.sqrt(40_000)
    assert noise.var() == pytest.approx(deviation**2, rel=5 * math.sqrt(2 / 40_000))
    # the whole bell, not its variance only
    below = [(noise < at).mean() for at in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    assert below == pytest.approx([0.02275, 0.15866, 0.5, 0.84134, 0.97725], abs=0.01)
    # halves come from one draw of Box and Muller: they must not know of each other
    assert abs(np.corrcoef(noise[:20_000], noise[20_000:])[0, 1]) < 0.03


def test_what_is_sent_lies_on_a_grid() -> None:
    sent = privatise(torch.randn(1, 500, generator=torch.manual_seed(1)), NOISE, KEY, 1, ["a"])
    assert torch.equal(sent * 1024, (sent * 1024).round())


def test_paper_like_noise_is_laplace_and_nothing_is_clipped() -> None:
    wide = torch.full((1, 40_000), 7.0)
    noise = privatise(wide, PaperLikeNoise(scale=0.1), KEY, 1, ["a"]).double().numpy()[0] - 7.0
    assert noise.var() == pytest.approx(2 * 0.1**2, rel=0.05)
    assert np.abs(noise).mean() == pytest.approx(0.1, rel=0.03)
    assert abs(np.median(noise)) < 0.003


def test_a_nan_is_refused_before_noise_hides_it() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the update of b holds a NaN"):
            privatise(torch.tensor([[1.0], [bad]]), NOISE, KEY, 1, ["a", "b"])


# --- whose noise --------------------------------------------------------------------------------


def test_noise_is_a_clients_own_whoever_is_beside_it() -> None:
    delta = torch.randn(5, 33, generator=torch.manual_seed(1))
    names = list("abcde")
    together = privatise(delta, NOISE, KEY, 3, names)
    for row, name in enumerate(names):
        assert torch.equal(privatise(delta[row : row + 1], NOISE, KEY, 3, [name])[0], together[row])
    turned = privatise(delta.flip(0), NOISE, KEY, 3, names[::-1])
    assert torch.equal(turned.flip(0), together)


def test_other_client_round_key_or_delta_is_other_noise() -> None:
    delta = torch.zeros(1, 64)
    sent = [
        privatise(delta, NOISE, KEY, 1, ["a"]),
        privatise(delta, NOISE, KEY, 1, ["b"]),
        privatise(delta, NOISE, KEY, 2, ["a"]),
        privatise(delta, NOISE, KEY[::-1], 1, ["a"]),
        privatise(delta + 1e-6, NOISE, KEY, 1, ["a"]),
    ]
    for i, one in enumerate(sent):
        for other in sent[:i]:
            assert (one != other).sum() > 32


def test_losses_are_withheld_or_clipped_and_noised() -> None:
    names = [f"c{i}" for i in range(4000)]
    assert all(math.isnan(x) for x in privatise_losses([1.0, 2.0], NOISE, KEY, 1, names[:2]))
    assert privatise_losses([1.0], PaperLikeNoise(scale=1.0), KEY, 1, ["a"]) == (1.0,)
    stage = NOISE.model_copy(update={"loss_clip": 4.0, "loss_sigma": 0.5})
    sent = np.array(privatise_losses([100.0] * 4000, stage, KEY, 1, names))
    assert sent.mean() == pytest.approx(4.0, abs=0.2)
    assert sent.std() == pytest.approx(2.0, rel=0.06)


def test_the_key(tmp_path: Path) -> None:
    def of(**privacy: Any) -> RunConfig:
        own = {"clip": 1, "sigma": 1} | privacy
        return parse({"method": FEDAVG, "privacy": own}, "test")

    assert find_key(of()) == find_key(of(sigma=2))
    assert find_key(of()) != find_key(of().model_copy(update={"seed": 1}))
    file = tmp_path / "key"
    with pytest.raises(FellrayError, match="cannot be read"):
        find_key(of(key=str(file)))
    file.write_bytes(b"short")
    with pytest.raises(FellrayError, match="has 5 bytes"):
        find_key(of(key=str(file)))
    file.write_bytes(KEY)
    assert find_key(of(key=str(file))) != find_key(of())


# --- a run --------------------------------------------------------------------------------------


def of_last(run: Any, name: str, round: int = 2) -> Any:
    return run.rounds.load(round, run.learners, [name])[name]


def test_any_grouping_and_any_order_of_arrival_give_the_same_noised_run(
    tiny_config: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "method": FEDAVG,
        "privacy": GAUSSIAN,
        "train": {"local_samples": 4},
        "evaluation": {"every": 9, "max_users": 1},
    }
    together = play(tiny_config(**settings))

    def backwards(pool: InlinePool, method: str, *columns: Sequence[Any], **_: Any) -> list[Any]:
        places = range(len(pool.members))
        answers = {
            i: getattr(pool.members[i], method)(*(column[i] for column in columns))
            for i in reversed(places)
        }
        return [answers[i] for i in places]

    monkeypatch.setattr(InlinePool, "map", backwards)
    apart = play(tiny_config(clients={"per_actor": 2}, **settings))
    assert apart.hashes(2) == together.hashes(2)
    # round 1 is the mean of five noised deltas, each clipped to 0.05
    moved = (of_last(together, "client.values", 1) - of_last(together, "client.values", 0))[0]
    assert moved.std().item() == pytest.approx(0.05 * 0.5 / math.sqrt(5), rel=0.1)
    bare = play(tiny_config(**settings | {"privacy": {"kind": "none"}}), last=1)
    same = [of_last(run, "trunk.values", 1) for run in (bare, together)]
    assert torch.equal(*same), "what the server itself computed is not noised"
    loose = {"clip": 1e3, "sigma": 1e-9}  # next to no stage: what is sent is what was trained
    near, far = (
        run.outcomes[1].reports.theta_CP
        for run in (play(tiny_config(**settings | {"privacy": loose}), last=1), bare)
    )
    torch.testing.assert_close(near, far, rtol=0, atol=2e-5)
    reports = together.outcomes[1].reports
    assert all(math.isnan(loss) for loss in reports.losses.values())
    assert "loss" not in {row.kind for row in together.ledger[1]}


def test_a_refused_clients_nan_does_not_leave_it_and_nobody_elses_noise_changes(
    tiny_config: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Update] = []
    fit = Client.fit
    monkeypatch.setattr(Client, "fit", lambda *args: sent.append(fit(*args)) or sent[-1])

    def poison(plant: Plant, t: int) -> None:
        if t:
            (client,) = plant._clients.members  # type: ignore[attr-defined]
            for desk in client._crews._sit(client.learners):
                for place, shard in enumerate(desk.reader.shards):
                    if shard.client == "c2":
                        desk.scorer.prior_KI[place] = torch.nan

    privacy = GAUSSIAN | {"loss_clip": 9.0, "loss_sigma": 0.1}
    settings = {"privacy": privacy, "evaluation": {"every": 9}}
    sick = play(tiny_config(**settings), before=poison, last=1)
    well = play(tiny_config(**settings), last=1)
    ill, whole = sent
    assert list(ill.refused) == ["c2"]
    start = of_last(sick, "client.values", 0)
    assert np.array_equal(ill.theta_SP[2], start[2].numpy()), "not even noise, which hides no NaN"
    assert math.isnan(ill.losses[2])
    others = [0, 1, 3, 4]
    assert np.array_equal(ill.theta_SP[others], whole.theta_SP[others])
    assert [ill.losses[i] for i in others] == [whole.losses[i] for i in others]
    assert np.isfinite(whole.losses).all()
    assert sick.outcomes[1].reports.meta.clients == ("c0", "c1", "c3", "c4")
    assert well.outcomes[1].reports.refused == {}


def train(config: RunConfig) -> dict[str, Any]:
    """As `jobs.train`, in this process."""
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        Plant.inline(config, world, run.rounds) as plant,
        Display(config, "", run.to_go()) as display,
    ):
        for t in run.spending.affordable(run.to_go(), plant.sample):
            outcome = plant.replayed(one_round, t, config)
            display.show(run.commit(t, outcome, plant.close_ledger(), plant.take_events()))
        return finish(run, plant, world, display)


def test_a_spent_budget_ends_a_run_that_is_whole_and_goes_on_with_a_larger_one(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # as where nothing but the update is sent
    monkeypatch.setattr("fellray.platform.accountant.sent_besides", lambda _: ())
    costs = [compute_epsilon(0.25, 1e-5, rounds) for rounds in range(4)]
    settings = {"method": FEDAVG, "evaluation": {"every": 9, "max_users": 1}}
    config = tiny_config(privacy=GAUSSIAN | {"epsilon": costs[1] + 0.1}, **settings)
    summary = train(config)
    assert summary["rounds"] == 1
    assert summary["privacy"]["stopped_before"] == 2
    assert summary["privacy"]["epsilon"] == costs[1]
    assert exit_status(summary) == SPENT
    assert any("stopped before round 2" in event for event in summary["events"])
    assert "stopped before round 2" in capsys.readouterr().out.replace("\n", " ")
    rows = Run(config).journal.rows("metrics")
    assert [row["privacy"]["epsilon"] for row in rows] == [0.0, costs[1]]
    assert rows[1]["loss"] is None
    page = Path(config.storage, config.name, "report.html").read_text()
    assert f"Epsilon {costs[1]:.3f} at delta 1e-05, per client" in page
    assert Run(config).is_finished()
    assert list_runs(config.storage)[0][-1] == "finished"

    larger = parse(
        config.model_dump(mode="json")
        | {"privacy": GAUSSIAN | {"epsilon": costs[2] + 0.1}, "keep_last": 3},
        "test",
    )
    summary = train(larger)
    assert summary["rounds"] == 2
    assert summary["privacy"]["epsilon"] == costs[2], "the first round is not forgotten"
    assert exit_status(summary) == 0


def test_a_budget_on_a_split_run_is_refused_before_anything_is_trained(tiny_config: Make) -> None:
    config = tiny_config(method=FEDAVG, privacy=GAUSSIAN | {"epsilon": 8})
    with (
        pytest.raises(FellrayError, match=r"privacy\.epsilon=8: no epsilon .* sends activations"),
        open_run(config, "data"),
    ):
        pass
    assert Run(config).rounds.latest() is None


def test_ranks_of_ones_own_do_not_go_with_noise(tiny_config: Make, tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("client,rank\nc0,1\n")
    with pytest.raises(FellrayError, match=r"own\.csv: rank or cut .* privacy\.kind=paper_like"):
        read_own(
            tiny_config(clients={"own": str(file)}, privacy={"kind": "paper_like", "scale": 0.1})
        )


def test_the_command_says_what_was_spent_and_ends_with_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spending = Spending(NOISE.model_copy(update={"epsilon": 10.0}), "user")
    trained = []
    for round in spending.affordable(range(9), lambda _: ["a"]):
        trained.append(round)
        spending.take_part(["a"] if round else [])
    summary = {"per_client": {"a": {}}, "privacy": spending.tree()}
    monkeypatch.setattr("fellray.jobs.train.train", lambda _: summary)
    monkeypatch.setattr("fellray.jobs.run_commands.show_summary", lambda _: None)
    config = tmp_path / "run.yaml"
    config.write_text("name: demo\n")
    monkeypatch.setattr("sys.argv", ["fellray", "train", str(config)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == SPENT == 3
    told = " ".join(capsys.readouterr().out.split())
    assert f"Privacy: epsilon {spending.epsilon:.3f} at delta 1e-05, per user" in told
    assert "recommend" in told, "the run is whole"
    summary["privacy"] = Spending(NoPrivacy(), "user").tree()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "Privacy" not in capsys.readouterr().out
