"""The baselines that the server computes: two clients by hand, and a short run of each."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fellray.platform.aggregation import Meta, Method, Plan, describe, reduce
from fellray.platform.config import RunConfig
from fellray.platform.fedopt import FedOpt
from fellray.platform.fedsa_lora import FedSaLora
from fellray.platform.qffl import QFfl
from fellray.platform.server_step import Partway

Play = Callable[..., Any]
Make = Callable[..., RunConfig]
START = [1.0, -2.0]
SENT = [[1.5, -2.0], [1.1, -4.0]]
LOSSES = [0.5, 2.0]
SPARSE = {"method": {"kind": "fedsa_lora"}, "sampling": {"per_round": 2}}


def two(losses: Sequence[float] = LOSSES, round: int = 1) -> tuple[Meta, Tensor, Tensor]:
    theta, start = torch.tensor(SENT), torch.tensor([START])
    meta = describe(round, ["a", "b"], losses, [1, 3], theta, start.expand(2, 2))
    return meta, theta, start


def end(method: Method, state: Any = None) -> tuple[list[float], Any, Plan]:
    """Where everybody is after a round."""
    meta, theta, start = two()
    plan = method.plan(meta)
    assert plan.common
    assert plan.step is not None
    new_1P, state = plan.step.take(start, reduce(plan, theta)[:1], state or {})
    return new_1P[0].tolist(), state, plan


# --- FedOpt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi", "fedadagrad"])
def test_fedopt_by_hand(kind: str) -> None:
    """Two clients, two rounds: the paper's algorithm 2, number by number."""
    rate, beta1, beta2, tau = 0.1, 0.9, 0.99, 0.5
    method = FedOpt(kind=kind, server_learning_rate=rate, tau=tau)
    first, state, _ = end(method)
    second, _, _ = end(method, state)
    gradient = [(0.5 + 0.1) / 2, (0.0 - 2.0) / 2]
    for p in range(2):
        square, m, v = gradient[p] ** 2, 0.0, tau**2
        for reached in (first, second):
            m = beta1 * m + (1 - beta1) * gradient[p]
            if kind == "fedadam":
                v = beta2 * v + (1 - beta2) * square
            elif kind == "fedyogi":
                v -= (1 - beta2) * square * (1 if v > square else -1)
            else:
                v += square
            wanted = START[p] + rate * m / (v**0.5 + tau)
            assert reached[p] == pytest.approx(wanted, rel=1e-6), (kind, p)


def test_fedopt_leaves_its_arguments_alone() -> None:
    _, state, plan = end(FedOpt())
    before = {name: tensor.clone() for name, tensor in state.items()}
    _, theta, start = two()
    assert plan.step is not None
    plan.step.take(start, theta[:1], state)
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert start.tolist() == [START]


def test_fedopt_counts_histories_where_it_is_told_to() -> None:
    assert FedOpt(weighting="samples").plan(two()[0]).mixing_CC.tolist() == [[0.25, 0.75]] * 2


# --- q-FFL --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "lipschitz"), [(1.0, 2.0), (0.5, 10.0), (2.0, 0.25)])
def test_qffl_by_hand(q: float, lipschitz: float) -> None:
    """The authors' formula as they write it: differences and their normaliser."""
    found, state, plan = end(QFfl(q=q, lipschitz=lipschitz))
    delta, normaliser = [0.0, 0.0], 0.0
    for sent, loss in zip(SENT, LOSSES, strict=True):
        gradient = [lipschitz * (w - mine) for w, mine in zip(START, sent, strict=True)]
        delta = [d + loss**q * g for d, g in zip(delta, gradient, strict=True)]
        square = sum(g * g for g in gradient)
        normaliser += q * loss ** (q - 1) * square + lipschitz * loss**q
    wanted = [w - d / normaliser for w, d in zip(START, delta, strict=True)]
    assert found == pytest.approx(wanted, rel=1e-6)
    assert not state
    assert plan.notes["update_weight"].sum() < 1


def test_qffl_with_q_zero_is_the_plain_mean() -> None:
    found, _, plan = end(QFfl(q=0.0, lipschitz=7.0))
    assert found == pytest.approx([1.3, -3.0])
    assert plan.notes["update_weight"].tolist() == pytest.approx([0.5, 0.5])


def test_qffl_survives_a_loss_of_zero_and_nobody() -> None:
    meta, _, _ = two([0.0, 1.0])
    plan = QFfl(q=0.5).plan(meta)
    assert bool(plan.mixing_CC.isfinite().all())
    nobody = describe(1, [], [], [], torch.empty(0, 2), torch.empty(0, 2))
    assert QFfl().plan(nobody).mixing_CC.shape == (0, 0)


def test_partway_goes_its_share() -> None:
    new, _ = Partway(0.25).take(torch.tensor([[0.0, 8.0]]), torch.tensor([[4.0, 4.0]]), {})
    assert new.tolist() == [[1.0, 7.0]]


# --- FedSA-LoRA ---------------------------------------------------------------------------------


def test_fedsa_by_hand() -> None:
    """A is the mean of both, B its client's."""
    theta = torch.tensor([[1.0, 2.0, 10.0, 3.0], [3.0, 6.0, 20.0, 5.0]])
    blocks = {"q.lora_A": slice(0, 2), "q.lora_B": slice(2, 3), "v.lora_A": slice(3, 4)}
    meta = describe(1, ["a", "b"], [1, 1], [1, 3], theta, theta, (), tuple(blocks))
    assert reduce(FedSaLora().plan(meta), theta, blocks).tolist() == [
        [2.0, 4.0, 10.0, 4.0],
        [2.0, 4.0, 20.0, 4.0],
    ]
    weighted = reduce(FedSaLora(weighting="samples").plan(meta), theta, blocks)
    assert weighted.tolist() == [[2.5, 5.0, 10.0, 4.5], [2.5, 5.0, 20.0, 4.5]]


# --- runs ---------------------------------------------------------------------------------------


def state_of(played: Any, round: int) -> dict[str, Tensor]:
    return {name: played.rounds.load_shared(round, name) for name in played.rounds.shared(round)}


def values(played: Any, round: int, part: str = "client") -> Tensor:
    name = f"{part}.values"
    found: Tensor = played.rounds.load(round, played.learners, [name])[name]
    return found


def test_fedadam_resumed_has_the_same_bits(tiny_config: Make, play: Play) -> None:
    settings: dict[str, Any] = {"method": {"kind": "fedadam"}, "evaluation": {"every": 9}}
    whole = play(tiny_config(**settings), last=2)
    config = tiny_config(**settings)
    play(config, last=1)
    resumed = play(config, last=2)
    assert resumed.hashes(2) == whole.hashes(2)
    assert len({*whole.hashes(2).values()}) == 1, "one state for all"
    moments = state_of(whole, 2)
    assert sorted(moments) == ["method.m", "method.v"]
    for name, tensor in state_of(resumed, 2).items():
        assert torch.equal(tensor, moments[name]), name
        assert not torch.equal(tensor, state_of(whole, 1)[name]), "it moves"
    # the step from the committed start over the committed state is what was installed
    reports, plan = whole.outcomes[2].reports, whole.outcomes[2].plan
    start = torch.cat([values(whole, 1), values(whole, 1, "trunk")], dim=1)[:1]
    before = {name.removeprefix("method."): t for name, t in state_of(whole, 1).items()}
    wanted, _ = plan.step.take(start, reduce(plan, reports.theta_CP)[:1], before)
    reached = torch.cat([values(whole, 2), values(whole, 2, "trunk")], dim=1)
    assert torch.equal(reached, wanted.expand_as(reached))


def test_a_round_that_refuses_everyone_keeps_the_servers_state(
    tiny_config: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fellray.actors import client as clients

    played = play(tiny_config(method={"kind": "fedadam"}, evaluation={"every": 9}), last=1)
    monkeypatch.setattr(clients, "_refuse", lambda loss, finite: "sick")
    after = play(played.config, last=2)
    assert after.hashes(2) == played.hashes(1)
    assert all(torch.equal(t, state_of(played, 1)[name]) for name, t in state_of(after, 2).items())


def test_qffl_goes_part_of_the_way(tiny_config: Make, play: Play) -> None:
    played = play(tiny_config(method={"kind": "qffl"}, evaluation={"every": 9}), last=1)
    reports, plan = played.outcomes[1].reports, played.outcomes[1].plan
    mean = reduce(plan, reports.theta_CP)[:1]
    start = torch.cat([values(played, 0), values(played, 0, "trunk")], dim=1)[:1]
    reached = torch.cat([values(played, 1), values(played, 1, "trunk")], dim=1)[:1]
    assert 0 < plan.step.share < 1
    torch.testing.assert_close(reached, start + plan.step.share * (mean - start))


def test_fedsa_sends_no_b_and_brings_everyone_the_mean_a(tiny_config: Make, play: Play) -> None:
    """Two of five take part: they keep their own B; all five begin the next round from one A."""
    played = play(tiny_config(**SPARSE, evaluation={"every": 1}), last=2)
    whole = play(tiny_config(**{**SPARSE, "method": {"kind": "fedavg"}}), last=1)
    sent = {k: {r.bytes for r in p.ledger[1] if r.kind == k} for p, k in ((played, "adapter_up"),)}
    blocks = played.outcomes[1].reports.blocks
    every = {k: [c for name, c in blocks.items() if name.endswith(k)] for k in ("_A", "_B")}
    client = values(played, 0).shape[1]
    of_client = [c for c in every["_A"] if c.stop <= client]
    assert sent["adapter_up"] == {4 * sum(c.stop - c.start for c in of_client)}
    assert {r.bytes for r in whole.ledger[1] if r.kind == "adapter_up"} == {4 * client}
    for t in (1, 2):
        both = torch.cat([values(played, t), values(played, t, "trunk")], dim=1)
        before = torch.cat([values(played, t - 1), values(played, t - 1, "trunk")], dim=1)
        reports, took = played.outcomes[t].reports, played.outcomes[t].reports.meta.clients
        assert len(took) == 2
        at = [played.learners.index(c) for c in took]
        others = [i for i in range(5) if i not in at]
        for columns in every["_A"]:
            mean = reports.theta_CP[:, columns].double().mean(0).float()
            assert torch.equal(both[:, columns], mean.expand(5, -1)), t
        for columns in every["_B"]:
            assert not torch.equal(both[at[0], columns], both[at[1], columns])
            assert torch.equal(both[others][:, columns], before[others][:, columns])
            if columns.stop <= client:
                assert not reports.theta_CP[:, columns].any(), "B stays at home"


def test_each_client_begins_with_its_own_a(tiny_config: Make, play: Play) -> None:
    """FELLRec's defect: unlike starts, which then are mixed; the common start is one for all."""
    method = {"kind": "fellrec", "defects": ["own_start"]}
    played = play(tiny_config(method=method, evaluation={"every": 9}), last=1)
    start, blocks = values(played, 0), played.outcomes[1].reports.blocks
    for name, columns in blocks.items():
        if columns.stop <= start.shape[1]:
            rows = start[:, columns]
            assert len({row.numpy().tobytes() for row in rows}) == (5 if name[-1] == "A" else 1)
    spread = start[:, blocks[next(iter(blocks))]].std(0).mean()
    assert spread > 0.05, "drawn anew, not perturbed"
    # what a round reports was trained from there: updates are small beside the starts' differences
    sent = played.outcomes[1].reports.theta_CP[:, : start.shape[1]]
    assert (sent - start).norm() < 0.5 * (start - start.mean(0)).norm()
    assert played.hashes(0) == play(
        tiny_config(method=method, clients={"per_actor": 2}), last=0
    ).hashes(0)


def test_every_layer_is_mixed_by_its_own_matrix(tiny_config: Make, play: Play) -> None:
    method = {"kind": "fellrec", "per_layer": True, "centred": True}
    played = play(tiny_config(method=method, evaluation={"every": 9}), last=1)
    reports, plan = played.outcomes[1].reports, played.outcomes[1].plan
    assert len({id(mixture) for mixture in plan.blocks.values()}) == len(reports.blocks) // 2
    reached = torch.cat([values(played, 1), values(played, 1, "trunk")], dim=1)
    for name, columns in reports.blocks.items():
        mixing = plan.blocks[name].mixing_CC
        wanted = (mixing @ reports.theta_CP[:, columns].double()).float()
        torch.testing.assert_close(reached[:, columns], wanted)
