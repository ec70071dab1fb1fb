"""The cut is invisible: loss and every gradient, bit for bit (promise 1); the ledger sees it all.

Shapes: N rows, n rows of one padded length, L real tokens, d width, S clients, P parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fellray.platform.adapters import Site
from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig, parse
from fellray.platform.encoder import MINILM, load_backbone
from fellray.platform.gradient_sum import GradientSum
from fellray.platform.host import TrunkHost
from fellray.platform.in_process import InProcess
from fellray.platform.kernel import Loras
from fellray.platform.lanes import Lanes
from fellray.platform.ledger import Ledger, total
from fellray.platform.messages import Activation, Gradient, Lease
from fellray.platform.packed import Batch, PackedBlocks
from fellray.platform.retrieval import Scorer, mean_losses
from fellray.platform.rounds import Rounds
from fellray.platform.rows import Rows
from fellray.platform.shard import Shard
from fellray.platform.span import Answer, Span, Trip, take_turns
from fellray.platform.split import Parts, cut_model
from fellray.platform.storage import Storage
from fellray.platform.tower import Tower
from fellray.platform.trunk import TorchEngine, Trunk

CLIENTS = ("a", "b", "c")
NUM_ITEMS = 40


@dataclass
class Setting:
    """One model, cut and uncut, with the same adapters for three clients."""

    config: RunConfig
    parts: Parts
    side: Bank
    """Bottom and top."""
    trunk_SP: Tensor
    host: TrunkHost
    remote: InProcess
    scorer: Scorer


@dataclass(frozen=True)
class Step:
    """A random batch."""

    rows: Rows
    ids_L: Tensor
    slot_N: Tensor
    target_N: Tensor


def sites(parts: Parts, *names: str) -> list[Site]:
    return [site for name in names for site in parts.cut.sites[name]]


def setting(name: str, cut: int, top: int, folder: Path) -> Setting:
    # with beta1 = 0 the first moment after a step is the gradient itself
    config = parse(
        {
            "model": {"name": name, "cut": cut, "top": top, "lora": {"r": 2}},
            "train": {"beta1": 0.0},
        },
        "test",
    )
    backbone = load_backbone(name)
    parts = cut_model(backbone, config.model)
    draw = torch.Generator().manual_seed(1)
    trunk_sites = sites(parts, "trunk")
    side = Bank(sites(parts, "bottom", "top"), config.model.lora, config.train, 3)
    side.values_SP.normal_(0, 0.2, generator=draw)
    trunk = torch.empty(3, sum(s.num_parameters(2) for s in trunk_sites))
    trunk.normal_(0, 0.2, generator=draw)
    engine = TorchEngine(Trunk(parts.trunk, trunk[0]), config)
    rounds = Rounds(Storage(str(folder)))
    rounds.commit(0, [rounds.stage(0, "trunk", CLIENTS, {"trunk.values": trunk})], {})
    host = TrunkHost(config, CLIENTS, trunk_sites, engine, rounds)
    vectors = F.normalize(torch.randn(NUM_ITEMS, backbone.dim, generator=draw), dim=1)
    nothing = Shard("a", np.array([0]), np.array([0, 1]), np.zeros(1, np.int32), np.zeros(1))
    scorer = Scorer(vectors.numpy(), [nothing], 0.05, prior=False)
    return Setting(config, parts, side, trunk, host, InProcess(host), scorer)


def random_step(seed: int, num_rows: int, longest: int) -> Step:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (num_rows,), generator=draw)
    slots = torch.randint(0, 3, (num_rows,), generator=draw).sort().values
    ids = torch.randint(5, 60, (int(lengths.sum()),), generator=draw)
    targets = torch.randint(0, NUM_ITEMS, (num_rows,), generator=draw)
    return Step(Rows(lengths, 16), ids, slots, targets)


def losses(s: Setting, u_Nd: Tensor, step: Step) -> Tensor:
    scores = s.scorer.score(u_Nd, torch.zeros_like(step.slot_N))
    return mean_losses(scores, step.target_N, step.slot_N, 3)


def header(step: Step, lease: Lease | None) -> Activation:
    return Activation(
        "run",
        1,
        0,
        lease,
        CLIENTS,
        step.slot_N.numpy().astype(np.int32),
        step.rows.lengths_N.numpy().astype(np.int32),
        np.empty((0, 0), np.float32),
    )


def through_the_cut(s: Setting, step: Step, ledger: Ledger) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [S], gradients of the client's side [S, P] and of the trunk's adapters [S, P]."""
    lease = s.remote.begin("run", 1, CLIENTS)()
    span = Span(s.remote, ledger)
    tower = Tower(s.parts.bottom, s.parts.top, 0, s.side)
    h_Ld, used = tower.rise(step.rows, step.ids_L, step.slot_N, train=True)
    activation = replace(header(step, lease), h_Ld=h_Ld.detach().numpy())
    y_Ld = torch.from_numpy(span.forward(activation)()).requires_grad_()
    loss_S = losses(s, tower.finish(step.rows, y_Ld, used), step)
    loss_S.sum().backward()
    assert y_Ld.grad is not None
    gradient_Ld = Gradient("run", 1, 0, y_Ld.grad.numpy())
    h_Ld.backward(torch.from_numpy(span.backward(activation, gradient_Ld)()))
    for slots_n, pairs in used:
        s.side.gradient.add(slots_n, pairs)
    gradient = s.side.gradient.total_SP.clone()
    s.side.gradient.total_SP.zero_()
    return loss_S.detach(), gradient, s.host._slots.bank.moment1_SP[s.host._merger.find(CLIENTS)]


def uncut(s: Setting, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one autograd graph, from the tokens to the loss: no messages, no host."""
    spec = s.config.model.lora
    client, trunk = sites(s.parts, "bottom", "top"), sites(s.parts, "trunk")
    sums = [GradientSum(client, spec.r, 3), GradientSum(trunk, spec.r, 3)]
    present, lane_N = step.slot_N.unique(return_inverse=True)
    lanes = Lanes(step.rows.lengths_N, lane_N, 16, torch.full_like(present, spec.r))
    own = present[lanes.order_K]
    ranks = [spec.r] * len(lanes.stacks)
    loras = Loras(trunk, lanes.stacks, ranks, spec.scaling_of, own, s.trunk_SP, sums[1].total_SP)
    batch, packed = Batch(lanes, [loras]), PackedBlocks(s.parts.trunk)

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h_Ld: Tensor) -> Tensor:
            y_Md, ctx.saved = packed.forward(lanes.spread(h_Ld), batch, keep=True)
            return lanes.collect(y_Md)

        @staticmethod
        def backward(ctx: Any, g_Ld: Tensor) -> Tensor:
            return lanes.collect(packed.backward(lanes.spread(g_Ld), ctx.saved, batch))

    tower = Tower(s.parts.bottom, s.parts.top, 0, s.side)
    u, used = tower.encode(step.rows, step.ids_L, step.slot_N, Inner.apply, train=True)
    loss_S = losses(s, u, step)
    loss_S.sum().backward()
    for slots, pairs in used:
        sums[0].add(slots, pairs)
    return loss_S.detach(), sums[0].total_SP, sums[1].total_SP


CASES = [
    ("bert", 1, 1, 8),
    ("bert", 0, 1, 4),
    ("bert", 2, 0, 4),
    ("bert", 0, 0, 4),
    ("bert", 1, 3, 4),
    ("roberta", 1, 1, 8),
    ("roberta", 2, 0, 4),
    ("minilm", 1, 1, 2),
]


@pytest.mark.parametrize(("encoder", "cut", "top", "batches"), CASES)
def test_split_equals_whole(
    encoder: str,
    cut: int,
    top: int,
    batches: int,
    tiny_encoder: Path,
    tiny_roberta: Path,
    tmp_path: Path,
) -> None:
    names = {"bert": str(tiny_encoder), "roberta": str(tiny_roberta), "minilm": MINILM}
    s = setting(names[encoder], cut, top, tmp_path)
    for seed in range(batches):
        step = random_step(seed, num_rows=3 + 2 * seed, longest=40)
        got, wanted = through_the_cut(s, step, Ledger()), uncut(s, step)
        for name, ours, theirs in zip(("loss", "client side", "trunk"), got, wanted, strict=True):
            assert torch.equal(ours, theirs), (name, seed, (ours - theirs).abs().max())
        present = step.slot_N.unique()
        assert wanted[2][present].abs().sum(1).min() > 0
        if wanted[1].shape[1]:
            assert wanted[1][present].abs().sum(1).min() > 0


def of_slot(step: Step, slot: int) -> Step:
    """The rows of one slot."""
    mine = step.slot_N == slot
    pieces = step.ids_L.split(step.rows.lengths_N.tolist())
    ids = torch.cat([piece for piece, own in zip(pieces, mine.tolist(), strict=True) if own])
    rows = Rows(step.rows.lengths_N[mine], 16)
    return Step(rows, ids, step.slot_N[mine], step.target_N[mine])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_slots_bits_do_not_depend_on_the_slots_beside_it(threads: int, tmp_path: Path) -> None:
    """Promise 4 on the client's side, with MiniLM's real weights: loss and gradients."""
    torch.set_num_threads(threads)
    s = setting(MINILM, 1, 1, tmp_path)
    for seed, (num_rows, longest) in enumerate([(6, 16), (9, 40)]):
        step = random_step(seed, num_rows, longest)
        together = through_the_cut(s, step, Ledger())
        for slot in step.slot_N.unique().tolist():
            alone = through_the_cut(s, of_slot(step, slot), Ledger())
            for name, ours, theirs in zip(
                ("loss", "client side", "trunk"), alone, together, strict=True
            ):
                assert torch.equal(ours[slot], theirs[slot]), (name, seed, slot)


def test_evaluation_through_the_cut_is_the_whole_models(tiny_encoder: Path, tmp_path: Path) -> None:
    s, step = setting(str(tiny_encoder), 1, 1, tmp_path), random_step(0, 6, 40)
    ledger = Ledger()
    span, tower = Span(s.remote, ledger), Tower(s.parts.bottom, s.parts.top, 0, s.side)
    asked = replace(header(step, None), round=0)
    with torch.no_grad():
        u, _ = tower.encode(
            step.rows,
            step.ids_L,
            step.slot_N,
            lambda h: torch.from_numpy(span.forward(replace(asked, h_Ld=h.numpy()))()),
            train=False,
        )
    assert torch.equal(losses(s, u, step), uncut(s, step)[0])
    assert set(total(ledger.close())) == {"evaluation_activation", "evaluation_output", "envelope"}


def test_what_crosses_is_entered_and_is_what_the_transport_counts(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    s, step, ledger = setting(str(tiny_encoder), 1, 1, tmp_path), random_step(3, 7, 40), Ledger()
    through_the_cut(s, step, ledger)
    packed, rows = step.rows.num_tokens * 32 * 4, len(step.slot_N)
    found = total(ledger.close())
    assert found == {
        "activation": packed,
        "output": packed,
        "gradient": packed,
        "activation_repeat": packed,
        "input_gradient": packed,
        "envelope": 2 * 8 * rows,
    }
    assert sum(found.values()) == s.remote.bytes


class Double:
    """A far side that adds one on the way up and doubles the gradient on the way down."""

    def __init__(self) -> None:
        self.forwards: list[Activation] = []
        self.backwards: list[tuple[Activation, Gradient]] = []
        self.waited: list[str] = []

    def begin(
        self, run: str, round: int, clients: tuple[str, ...], twin: bool = False
    ) -> Callable[[], Lease]:
        return lambda: Lease("double", 1)

    def forward(self, activation: Activation) -> Answer:
        self.forwards.append(activation)
        return lambda: self._wait("forward", activation.h_Ld + 1)

    def backward(self, activation: Activation, gradient: Gradient) -> Answer:
        self.backwards.append((activation, gradient))
        return lambda: self._wait("backward", gradient.g_Ld * 2)

    def _wait(self, kind: str, answer: np.ndarray) -> np.ndarray:
        self.waited.append(kind)
        return answer


def test_asking_waits_for_nothing_and_is_entered_once_it_is_answered() -> None:
    double, ledger = Double(), Ledger()
    step = random_step(0, 2, 5)
    span, sent = Span(double, ledger), header(step, Lease("double", 1))
    h_Ld = np.ones((step.rows.num_tokens, 3), np.float32)
    asked = span.forward(replace(sent, h_Ld=h_Ld))
    assert len(double.forwards) == 1
    assert double.waited == []
    assert (asked() == 2).all()
    assert double.waited == ["forward"]
    back = span.backward(double.forwards[0], Gradient("run", 1, 0, h_Ld))
    assert (back() == 2).all()
    assert double.backwards[0][0] is double.forwards[0], "the activation comes again"
    assert set(total(ledger.close())) == {
        "activation",
        "output",
        "gradient",
        "activation_repeat",
        "input_gradient",
        "envelope",
    }


def test_a_refusal_of_the_far_side_is_raised_and_not_entered() -> None:
    class Refusing(Double):
        def forward(self, activation: Activation) -> Answer:
            return lambda: refuse()

    def refuse() -> np.ndarray:
        raise RuntimeError("not now")

    ledger, step = Ledger(), random_step(0, 2, 5)
    h_Ld = np.ones((step.rows.num_tokens, 3), np.float32)
    asked = Span(Refusing(), ledger).forward(replace(header(step, None), h_Ld=h_Ld))
    with pytest.raises(RuntimeError, match="not now"):
        asked()
    assert ledger.close() == []


def test_one_works_while_the_others_wait() -> None:
    """Every trip has asked before anyone is waited for; turns go round in a fixed order."""
    seen: list[str] = []

    def trip(name: str, crossings: int) -> Trip[str]:
        for at in range(crossings):

            def answer(at: int = at) -> np.ndarray:
                seen.append(f"wait {name}{at}")
                return np.array(at)

            seen.append(f"ask {name}{at}")
            assert (yield answer) == at
        return name.upper()

    assert take_turns([trip("a", 2), trip("b", 1), trip("c", 0)]) == ["A", "B", "C"]
    assert seen == [
        "ask a0", "ask b0", "wait a0", "ask a1", "wait b0", "wait a1"
    ]  # fmt: skip


def test_a_trip_that_fails_ends_all() -> None:
    def failing() -> Trip[None]:
        yield lambda: np.array(0)
        raise RuntimeError("no")

    def endless() -> Trip[None]:
        while True:
            yield lambda: np.array(0)

    with pytest.raises(RuntimeError, match="no"):
        take_turns([endless(), failing()])
