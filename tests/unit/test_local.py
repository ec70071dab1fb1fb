"""Methods that change local training, against two clients worked out by hand.

The clients' losses are a_c/2 ||theta - b_c||^2 on both sides of the cut, so that the papers' loops
can be written down in a few lines of numpy; everything else is a real run: slots, pages, messages,
the mixture. Five clients are registered, c0 and c1 take part. What is compared is a client's whole
row, bottom, top and trunk.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fellray.actors.plant import Plant
from fellray.platform.adapters import Site, find_columns, name_blocks, views
from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig, parse
from fellray.platform.errors import FellrayError
from fellray.platform.ledger import total
from fellray.platform.local import LocalRule, advance_control
from fellray.platform.model_config import LoraSpec
from fellray.platform.slots import Slots
from fellray.platform.train_config import TrainConfig

Make = Callable[..., RunConfig]
Play = Callable[..., Any]
Vectors = list[np.ndarray]

PAIR = ("c0", "c1")
CURVE = (0.5, 0.2)
CENTRE = (0.02, -0.03)
RATE, STEPS, ROUNDS, REGISTERED = 0.1, 3, 2, 5


def gradient(client: int, theta: np.ndarray) -> np.ndarray:
    return CURVE[client] * (theta - CENTRE[client])


@pytest.fixture
def quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the model's gradients those of the losses above."""
    seen: list[Slots] = []
    train, step = Slots.train, Bank.step

    def trains(self: Slots, clients: Sequence[str], twin: bool = False) -> None:
        seen.extend([] if any(one is self for one in seen) else [self])
        train(self, clients, twin)

    def steps(self: Bank, slots_s: torch.Tensor) -> None:
        (own,) = (one for one in seen if one.bank is self)
        for client, slot in own._slot.items():
            if slot in slots_s.tolist():
                at = PAIR.index(client)
                self.gradient.total_SP[slot] = CURVE[at] * (self.values_SP[slot] - CENTRE[at])
        step(self, slots_s)

    monkeypatch.setattr(Slots, "train", trains)
    monkeypatch.setattr(Bank, "step", steps)


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """Runs that were played already."""
    return {}


@pytest.fixture
def run(
    quadratic: None, known: dict[str, Any], tiny_config: Make, play: Play
) -> Callable[..., Any]:
    """`run(kind="fedprox", mu=0.5)`: two rounds of c0 and c1."""

    def ask(plant: Plant, t: int) -> None:
        plant.sample = lambda t: PAIR  # type: ignore[method-assign]

    def make(optimizer: str = "sgd", **method: Any) -> Any:
        key = json.dumps([optimizer, method], sort_keys=True)
        if key not in known:
            settings = {"optimizer": optimizer, "learning_rate": RATE, "rounds": ROUNDS}
            rest = {"evaluation": {"every": 9, "max_users": 1}, "keep_last": 9}
            config = tiny_config(method=method, train=settings, **rest)
            known[key] = play(config, before=ask)
        return known[key]

    return make


def state(played: Any, round: int, clients: Sequence[str], kind: str = "values") -> Vectors:
    names = [f"client.{kind}", f"trunk.{kind}"]
    loaded = played.rounds.load(round, list(clients), names)
    return [np.concatenate([loaded[n][i].numpy() for n in names]) for i in range(len(clients))]


def close(found: Vectors, wanted: Vectors) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)


def test_fedprox_by_hand(run: Play) -> None:
    """Li et al.'s equation 2: the objective is F_c(y) + mu/2 ||y - x||^2."""
    mu = 0.7
    played = run(kind="fedprox", mu=mu)
    x = state(played, 0, ["c0"])[0].astype(np.float64)
    for _ in range(ROUNDS):
        ends = []
        for client in (0, 1):
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * (gradient(client, y) + mu * (y - x))
            ends.append(y)
        x = (ends[0] + ends[1]) / 2
    close(state(played, ROUNDS, ["c0", "c1", "c4"]), [x, x, x])
    assert np.abs(x - state(run(kind="fedavg"), ROUNDS, ["c0"])[0]).max() > 1e-3, "the pull is felt"


def test_fedprox_without_a_pull_is_fedavg(run: Play) -> None:
    assert run(kind="fedprox", mu=0).hashes(ROUNDS) == run(kind="fedavg").hashes(ROUNDS)


def test_ffa_lora_by_hand(run: Play) -> None:
    """Sun et al.'s section 4: B_c <- B_c - lr dF/dB_c, B <- mean of the B_c, A as it was drawn."""
    played = run(kind="ffa_lora")
    start = state(played, 0, ["c0"])[0]
    x, trains = start.astype(np.float64), start == 0  # B starts at zero, A nowhere
    assert 0.4 < trains.mean() < 0.6
    for _ in range(ROUNDS):
        ends = []
        for client in (0, 1):
            y = x.copy()
            for _ in range(STEPS):
                y[trains] = y[trains] - RATE * gradient(client, y[trains])
            ends.append(y)
        x = (ends[0] + ends[1]) / 2
    found = state(played, ROUNDS, ["c0", "c1", "c4"])
    close(found, [x, x, x])
    assert all(np.array_equal(one[~trains], start[~trains]) for one in found), "not by one bit"
    kinds = total(played.ledger[ROUNDS])
    assert kinds["adapter_up"] == kinds["adapter_down"] == 2 * 256 * 4, "A is in no message"


def test_ditto_by_hand(run: Play) -> None:
    """Li et al.'s algorithm 1: w as FedAvg trains it, v_c pulled to the w of the round's start."""
    pull = 0.4
    played = run(kind="ditto", pull=pull)
    w = state(played, 0, ["c0"])[0].astype(np.float64)
    personal = [w.copy(), w.copy()]
    for _ in range(ROUNDS):
        ends = []
        for client in (0, 1):
            y, v = w.copy(), personal[client]
            for _ in range(STEPS):
                y = y - RATE * gradient(client, y)
                v = v - RATE * (gradient(client, v) + pull * (v - w))
            ends.append(y)
            personal[client] = v
        w = (ends[0] + ends[1]) / 2
    close(state(played, ROUNDS, PAIR), personal)
    close(state(played, ROUNDS, ["c0", "c1", "c3"], "anchor"), [w, w, w])
    close([row.numpy() for row in played.outcomes[ROUNDS].reports.theta_CP], ends)
    assert np.array_equal(state(played, ROUNDS, ["c3"])[0], state(played, 0, ["c3"])[0])


def test_fedamp_by_hand(run: Play) -> None:
    """Huang et al.'s equations 4 to 6: u_i = xi_ii theta_i + xi_ij theta_j, then a pull to it."""
    alpha, sigma, pull = 0.3, 0.5, 0.4
    played = run(kind="fedamp", alpha=alpha, sigma=sigma, pull=pull)
    start = state(played, 0, ["c0"])[0].astype(np.float64)
    theta, cloud = [start.copy(), start.copy()], [start.copy(), start.copy()]
    for _ in range(ROUNDS):
        for client in (0, 1):
            y = theta[client]
            for _ in range(STEPS):
                y = y - RATE * (gradient(client, y) + pull * (y - cloud[client]))
            theta[client] = y
        distance = ((theta[0] - theta[1]) ** 2).sum()
        xi = alpha * np.exp(-distance / sigma) / sigma
        cloud = [(1 - xi) * theta[0] + xi * theta[1], xi * theta[0] + (1 - xi) * theta[1]]
    assert 0.1 < np.exp(-distance / sigma) < 0.9, "the distance is felt"
    close(state(played, ROUNDS, PAIR), theta)
    close(state(played, ROUNDS, PAIR, "anchor"), cloud)
    for kind in ("values", "anchor"):
        assert np.array_equal(state(played, ROUNDS, ["c3"], kind)[0], state(played, 0, ["c3"])[0])


def test_scaffold_by_hand(run: Play) -> None:
    """Karimireddy et al.'s algorithm 1 with option II, two of five clients in every round."""
    played = run(kind="scaffold")
    x = state(played, 0, ["c0"])[0].astype(np.float64)
    c, own = np.zeros_like(x), [np.zeros_like(x), np.zeros_like(x)]
    for _ in range(ROUNDS):
        ends, new = [], []
        for client in (0, 1):
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * (gradient(client, y) - own[client] + c)
            new.append(own[client] - c + (x - y) / (STEPS * RATE))
            ends.append(y)
        x = x + ((ends[0] - x) + (ends[1] - x)) / 2
        c = c + ((new[0] - own[0]) + (new[1] - own[1])) / REGISTERED
        own = new
    close(state(played, ROUNDS, ["c0", "c1", "c4"]), [x, x, x])
    for found, wanted in (
        (state(played, ROUNDS, PAIR, "control"), own),
        (state(played, ROUNDS, ["c0", "c4"], "server_control"), [c, c]),
    ):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-5)
    assert not state(played, ROUNDS, ["c4"], "control")[0].any(), "who took no part"
    assert np.abs(x - state(run(kind="fedavg"), ROUNDS, ["c0"])[0]).max() > 1e-3


def test_scaffold_begins_as_fedavg_with_sgd(run: Play) -> None:
    one, other = run(kind="scaffold"), run(kind="fedavg")
    assert one.hashes(1) == other.hashes(1)
    assert one.hashes(2) != other.hashes(2)


# --- a bank's steps ----------------------------------------------------------------------------

SITES = [Site("encoder.layer.0.q", 3, 4), Site("encoder.layer.1.v", 5, 2)]
WIDTH = 2 * (3 + 4) + 2 * (5 + 2)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0]], ids=["side by side", "apart"])
def test_a_pull_is_part_of_the_gradient_that_adamw_sees(slots: list[int]) -> None:
    train = TrainConfig(learning_rate=0.03, weight_decay=0.1, clip=2.0)
    bank = Bank(SITES, LoraSpec(r=2), train, 3, rule=LocalRule(pull=0.5))
    at, start = torch.tensor(slots), numbers(3, WIDTH, seed=9)
    bank.reset(torch.arange(3), {"values": start})
    bank.begin(at)
    theirs = {slot: torch.nn.Parameter(start[slot].clone()) for slot in slots}
    optimizers = {
        slot: torch.optim.AdamW([p], lr=0.03, weight_decay=0.1, fused=True)
        for slot, p in theirs.items()
    }
    for step in range(3):
        drawn = numbers(3, WIDTH, seed=step)
        bank.gradient.total_SP[at] = drawn[at]
        bank.step(at)
        for slot, parameter in theirs.items():
            clipped = drawn[slot] * (2.0 / (drawn[slot].norm() + 1e-6)).clamp(max=1.0)
            parameter.grad = clipped + (parameter.detach() - start[slot]) * 0.5
            optimizers[slot].step()
    for slot, parameter in theirs.items():
        assert torch.equal(bank.values_SP[slot], parameter.detach())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_is_torchs(decay: float) -> None:
    train = TrainConfig(optimizer="sgd", learning_rate=0.5, weight_decay=decay)
    bank = Bank(SITES, LoraSpec(r=2), train, 2)
    bank.reset(torch.arange(2), {"values": numbers(2, WIDTH, seed=9)})
    parameter = torch.nn.Parameter(bank.values_SP[1].clone())
    optimizer = torch.optim.SGD([parameter], lr=0.5, weight_decay=decay)
    for step in range(3):
        bank.gradient.total_SP[1] = parameter.grad = numbers(WIDTH, seed=step)
        bank.step(torch.tensor([1]))
        optimizer.step()
    torch.testing.assert_close(bank.values_SP[1], parameter.detach())
    assert torch.equal(bank.values_SP[0], numbers(2, WIDTH, seed=9)[0])
    assert bank.moment1_SP.numel() == 0, "it has no moments"


def test_a_frozen_a_has_no_step_and_no_part_in_the_clip() -> None:
    train = TrainConfig(learning_rate=0.03, weight_decay=0.1, clip=1.0)
    bank = Bank(SITES, LoraSpec(r=3), train, 2, rule=LocalRule(freezes_a=True))
    bank.set_ranks(torch.arange(2), [3, 2])
    bank.reset(torch.arange(2), {"values": numbers(2, WIDTH // 2 * 3, seed=9)})
    held = bank.values_SP.clone()
    columns = find_columns(name_blocks(SITES, 3), lambda block: block.endswith("lora_B"))
    bare = Bank(SITES, LoraSpec(r=3), train, 2)
    bare.set_ranks(torch.arange(2), [3, 2])
    bare.reset(torch.arange(2), {"values": held})
    for step in range(2):
        drawn = numbers(2, WIDTH // 2 * 3, seed=step)
        for one, pairs in ((bank, views(drawn, SITES, 3)), (bare, views(drawn.clone(), SITES, 3))):
            for _, b in pairs:
                b[1, :, 2:] = 0.0
            for (a, b), (ta, tb) in zip(pairs, one.gradient._views, strict=True):
                ta.copy_(a if one is bank else torch.zeros_like(a))
                tb.copy_(b)
            one.step(torch.arange(2))
    assert torch.equal(bank.values_SP[:, columns], bare.values_SP[:, columns])
    rest = torch.ones(bank.values_SP.shape[1], dtype=torch.bool)
    rest[columns] = False
    assert torch.equal(bank.values_SP[:, rest], held[:, rest])
    assert not torch.equal(bare.values_SP[:, rest], held[:, rest]), "its decay would move it"


def test_who_takes_no_step_keeps_its_control() -> None:
    control = advance_control(
        torch.tensor([[1.0], [1.0]]),
        torch.tensor([[0.25], [0.25]]),
        torch.tensor([[3.0], [3.0]]),
        torch.tensor([[3.0], [2.0]]),
        torch.tensor([0, 2]),
        0.5,
    )
    assert control.tolist() == [[1.0], [1.0 - 0.25 + 1.0]]


# --- what does not go together ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        ({"method": {"kind": "scaffold"}}, "method.kind=scaffold .*train.optimizer=sgd"),
        (
            {"method": {"kind": "fedamp"}, "train": {"share": "trunk_only"}},
            "train.share=all, it is trunk_only",
        ),
        ({"method": {"kind": "ditto"}, "train": {"moments": "keep"}}, "set train.moments=reset"),
        ({"train": {"moments": "keep", "optimizer": "sgd"}}, "keep is for optimizer adamw"),
        ({"method": {"kind": "fedprox", "mu": -1}}, "method.fedprox.mu"),
    ],
)
def test_what_does_not_go_together_is_refused(tree: dict[str, Any], wanted: str) -> None:
    with pytest.raises(FellrayError, match=wanted):
        parse(tree, "mine.yaml")


def test_controls_want_one_rank_and_one_mixture(
    tmp_path: Path, tiny_config: Make, play: Play
) -> None:
    own = tmp_path / "own.csv"
    own.write_text("client,rank\nc1,1\n")
    train = {"optimizer": "sgd"}
    config = tiny_config(method={"kind": "scaffold"}, train=train, clients={"own": str(own)})
    with pytest.raises(FellrayError, match=r"own.csv: rank is each client's own"):
        play(config)
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from fellray.platform.local import LocalRule\n"
        "from fellray.platform.methods import Local\n"
        "class Mine(Local):\n"
        "    def local(self):\n"
        "        return LocalRule(controls=True)\n"
    )
    method = {"kind": "file", "path": str(mine), "name": "Mine"}
    with pytest.raises(FellrayError, match=r"Plan\(..., common=True\)"):
        play(tiny_config(method=method, train=train, evaluation={"max_users": 1}), last=1)
