"""Stacked adapters: peft's arithmetic, torch's AdamW, and nobody's bits but one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from fellray.platform.adapters import LoraLinear, Pair, Site, cut_, start, views
from fellray.platform.bank import Bank, finite_rows, state_names
from fellray.platform.encoder import load_backbone
from fellray.platform.gradient_sum import GradientSum
from fellray.platform.model_config import LoraSpec, ModelConfig
from fellray.platform.split import PARTS, Parts, cut_model
from fellray.platform.train_config import TrainConfig

SITES = [Site("encoder.layer.0.q", 3, 4), Site("encoder.layer.1.v", 5, 2)]
SPEC = LoraSpec(r=2)
WIDTH = 2 * (3 + 4) + 2 * (5 + 2)
ALIGNED = [Site("encoder.layer.0.q", 16, 32), Site("encoder.layer.1.v", 48, 16)]
"""Of widths that processors' registers divide, as models have them: what is left over of a row has
other bits, so they depend on where it ends."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank(slots: int, **train: Any) -> Bank:
    made = Bank(SITES, SPEC, TrainConfig(**train), slots)
    made.values_SP.copy_(numbers(slots, WIDTH, seed=9))
    return made


def test_a_bank_that_nobody_trains_holds_values_alone() -> None:
    bank = Bank(SITES, SPEC, None, 3)
    values_SP = torch.arange(2.0 * bank.values_SP.shape[1]).view(2, -1)
    bank.reset(torch.tensor([0, 2]), {"values": values_SP})
    assert torch.equal(bank.values_SP[[0, 2]], values_SP)
    assert bank.state(torch.tensor([2]), True).keys() == {"values"}
    others = (bank.moment1_SP, bank.moment2_SP, bank.steps_S, bank.gradient.total_SP)
    assert sum(tensor.numel() for tensor in others) == 0
    with pytest.raises(AssertionError, match="nobody trains"):
        bank.step(torch.tensor([0]))


def test_views_are_the_flat_row_cut_up() -> None:
    flat = torch.arange(2.0 * WIDTH).reshape(2, WIDTH)
    (a0, b0), (a1, b1) = views(flat, SITES, 2)
    assert [tuple(t.shape) for t in (a0, b0, a1, b1)] == [
        (2, 2, 3),
        (2, 4, 2),
        (2, 2, 5),
        (2, 2, 2),
    ]
    assert a0[0].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert b0[0].flatten().tolist() == [float(i) for i in range(6, 14)]
    assert a1[1, 0, 0].item() == WIDTH + 14.0
    a0[1, 0, 0] = -1.0
    assert flat[1, 0].item() == -1.0, "a view, not a copy"


def test_start_is_pefts_and_does_not_depend_on_the_cut() -> None:
    whole = start(SITES, SPEC, seed=3)
    assert torch.equal(whole, torch.cat([start([site], SPEC, 3) for site in SITES]))
    assert torch.equal(whole, start(SITES, SPEC, 3))
    assert not torch.equal(whole, start(SITES, SPEC, 4))
    for (a, b), site in zip(views(whole[None], SITES, 2), SITES, strict=True):
        assert b.abs().max() == 0.0
        bound = (1 / site.d_in) ** 0.5
        assert 0.5 * bound < a.abs().max() <= bound
    wide = start([Site("w", 400, 1)], SPEC, 0)[:800]
    assert wide.std().item() == pytest.approx((1 / 400 / 3) ** 0.5, rel=0.1), "uniform, as peft"


def test_start_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    start(SITES, SPEC, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_state_names() -> None:
    assert state_names("trunk", False) == ["trunk.values"]
    assert state_names("client", True) == [
        "client.values",
        "client.moment1",
        "client.moment2",
        "client.steps",
    ]


def test_lora_linear_by_hand() -> None:
    base = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.eye(2))
    layer, x = LoraLinear(base, scaling=3.0), torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]])
    assert torch.equal(layer(x), x), "no adapters: the base alone"
    a = torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]])
    b = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
    layer.pairs = ((a, b),)
    assert layer(x).tolist() == [[[10.0, 2.0]], [[1.0, 8.0]]], "each row its own"
    layer.pairs = ((a, b), (a, b))
    assert layer(x).tolist() == [[[19.0, 2.0]], [[1.0, 14.0]]], "sets add up"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("targets", "dtype", "tolerance"),
    [
        (("query", "value"), torch.float32, 1e-6),
        (("query", "value"), torch.float64, 1e-13),
        (("key", "output.dense"), torch.float64, 1e-13),  # a key's gradient cancels in fp32
    ],
)
def test_one_client_is_pefts_lora(
    tiny_encoder: Path, targets: tuple[str, ...], dtype: torch.dtype, tolerance: float, rslora: bool
) -> None:
    """The same A and B in peft's own model: the same output and the same gradients."""
    spec = LoraSpec(r=4, lora_alpha=8, target_modules=targets, use_rslora=rslora)
    config = ModelConfig(name=str(tiny_encoder), lora=spec)
    parts = cut_model(load_backbone(config.name), config)
    for module in (parts.bottom, parts.trunk, parts.top):
        module.to(dtype)
    sites = [site for part in PARTS for site in parts.cut.sites[part]]
    one = Bank(sites, spec, TrainConfig(), 1)
    one.values_SP.copy_(numbers(*one.values_SP.shape) * 0.3)

    # whole paths: peft takes a name for an ending, and "output.dense" ends attention's own too
    paths = [site.path for site in sites]
    theirs = peft.get_peft_model(
        AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False),
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=paths, use_rslora=rslora, lora_dropout=0.0
        ),
    )
    layers = {p: theirs.base_model.model.get_submodule(p) for p in paths}
    with torch.no_grad():
        for site, (a, b) in zip(sites, views(one.values_SP, sites, 4), strict=True):
            layers[site.path].lora_A["default"].weight.copy_(a[0])
            layers[site.path].lora_B["default"].weight.copy_(b[0])
    theirs.eval().to(dtype)

    ids = torch.randint(5, 60, (3, 16), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(16) < torch.tensor([[16], [9], [3]])
    weight = (numbers(3, 16, 32) * mask[:, :, None]).to(dtype)
    expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    (expected * weight).sum().backward()

    pairs = [
        (a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_())
        for a, b in one.gather(torch.zeros(3, dtype=torch.int64), train=False)
    ]
    got = run_whole(parts, ids, mask, pairs)
    (got * weight).sum().backward()
    close(got[mask], expected[mask], tolerance)
    for site, (a, b) in zip(sites, pairs, strict=True):
        layer = layers[site.path]
        close(a.grad.sum(0), layer.lora_A["default"].weight.grad, tolerance)
        close(b.grad.sum(0), layer.lora_B["default"].weight.grad, tolerance)


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert wanted.norm() > 0
    assert (got - wanted).norm() <= tolerance * wanted.norm()


def run_whole(parts: Parts, ids: Tensor, mask: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """All blocks in one graph, hidden states out."""
    ends = [len(parts.cut.sites["bottom"]), len(parts.cut.sites["trunk"])]
    bottom, trunk = pairs[: ends[0]], pairs[ends[0] : sum(ends)]
    h = parts.bottom(ids, mask, [bottom])
    return parts.top.blocks(parts.trunk(h, mask, [trunk]), mask, [pairs[sum(ends) :]])


def test_gradients_are_added_row_by_row_to_their_slots() -> None:
    total = GradientSum(SITES, 2, 3)
    slots = torch.tensor([2, 0, 2])
    leaves = [
        (torch.zeros(3, 2, 3, requires_grad=True), torch.zeros(3, 4, 2, requires_grad=True)),
        (torch.zeros(3, 2, 5, requires_grad=True), torch.zeros(3, 2, 2, requires_grad=True)),
    ]
    flat = numbers(3, WIDTH)
    for (a, b), (ga, gb) in zip(leaves, views(flat, SITES, 2), strict=True):
        a.grad, b.grad = ga.clone(), gb.clone()
    total.add(slots, leaves)
    assert torch.equal(total.total_SP[0], flat[1])
    assert torch.equal(total.total_SP[1], torch.zeros(WIDTH))
    assert torch.equal(total.total_SP[2], flat[0] + flat[2])
    total.add(slots, leaves)
    assert torch.equal(total.total_SP[2], (flat[0] + flat[2] + flat[0]) + flat[2])


def test_gather_gives_each_row_its_clients_own_leaves() -> None:
    one = bank(3)
    slots = torch.tensor([1, 1, 0])
    for (a, b), (a_S, b_S) in zip(
        one.gather(slots, train=True), views(one.values_SP, SITES, 2), strict=True
    ):
        assert torch.equal(a, a_S[slots])
        assert torch.equal(b, b_S[slots])
        assert a.is_leaf
        assert a.requires_grad
        assert a.data_ptr() != a_S.data_ptr()
    assert not one.gather(slots, train=False)[0][0].requires_grad


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_step_is_torchs_adamw_of_each_slot_alone(decay: float, threads: int) -> None:
    """Bit for bit over 20 steps, clients absent at random (promise 5: absent, not one byte)."""
    torch.set_num_threads(threads)
    settings = {"learning_rate": 0.03, "weight_decay": decay, "beta1": 0.8, "beta2": 0.95}
    ours = bank(5, **settings)
    theirs = [torch.nn.Parameter(row.clone()) for row in ours.values_SP]
    optimizers = [
        torch.optim.AdamW([p], lr=0.03, weight_decay=decay, betas=(0.8, 0.95), fused=True)
        for p in theirs
    ]
    plain = torch.nn.Parameter(ours.values_SP[4].clone())
    slow = torch.optim.AdamW([plain], lr=0.03, weight_decay=decay, betas=(0.8, 0.95), fused=False)
    draw = torch.Generator().manual_seed(7)
    for step in range(20):
        present = (torch.rand(5, generator=draw) < 0.6).nonzero().squeeze(1)
        if step == 3:
            present = present[:0]
        gradient = numbers(5, WIDTH, seed=step) * 10.0 ** float(step % 5 - 3)
        gradient[:, ::7] = 0.0
        before = ours.state(torch.arange(5), moments=True)
        ours.gradient.total_SP[present] = gradient[present]
        ours.step(present)
        for slot in present.tolist():
            theirs[slot].grad = gradient[slot].clone()
            optimizers[slot].step()
        if 4 in present:
            plain.grad = gradient[4].clone()
            slow.step()
        absent = [s for s in range(5) if s not in present.tolist()]
        for name, tensor in ours.state(torch.arange(5), moments=True).items():
            was = before[name][absent]
            assert tensor[absent].numpy().tobytes() == was.numpy().tobytes(), (step, name)
        for slot in range(5):
            assert torch.equal(ours.values_SP[slot], theirs[slot].detach()), (step, slot)
            held = optimizers[slot].state.get(theirs[slot], {})
            if held:
                assert torch.equal(ours.moment1_SP[slot], held["exp_avg"])
                assert torch.equal(ours.moment2_SP[slot], held["exp_avg_sq"])
                assert ours.steps_S[slot].item() == held["step"].item()
        torch.testing.assert_close(ours.values_SP[4], plain.detach(), rtol=1e-5, atol=1e-6)
    assert len(set(ours.steps_S.tolist())) > 1, "everyone was always there: nothing was tested"


def test_a_step_spends_its_gradient() -> None:
    one = bank(2)
    one.gradient.total_SP += 1.0
    one.step(torch.tensor([1]))
    assert one.gradient.total_SP[1].abs().max() == 0.0
    assert torch.equal(one.gradient.total_SP[0], torch.ones(WIDTH))


def test_clip_bounds_each_slot_by_its_own_norm() -> None:
    gradient = torch.stack([torch.full((WIDTH,), 10.0), torch.full((WIDTH,), 1e-3)])
    clipped, free = bank(2, clip=0.5, beta1=0.0), bank(2, beta1=0.0)
    for one in (clipped, free):
        one.gradient.total_SP.copy_(gradient)
        one.step(torch.arange(2))
    # with beta1 = 0 the first moment is the gradient that was used
    norms = clipped.moment1_SP.norm(dim=1)
    assert norms[0].item() == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(clipped.moment1_SP[1], free.moment1_SP[1]), "short ones are left alone"


def test_clip_and_step_do_not_depend_on_who_else_steps() -> None:
    together, alone = bank(3, clip=0.1), bank(3, clip=0.1)
    gradient = numbers(3, WIDTH, seed=4) * torch.tensor([[1.0], [1e4], [1e-4]])
    together.gradient.total_SP.copy_(gradient)
    together.step(torch.arange(3))
    alone.gradient.total_SP.copy_(gradient)
    for slot in (2, 0, 1):
        alone.step(torch.tensor([slot]))
    assert torch.equal(together.values_SP, alone.values_SP)


def test_a_nan_stays_with_its_slot() -> None:
    one = bank(3, clip=1.0)
    clean = bank(3, clip=1.0)
    gradient = numbers(3, WIDTH, seed=4)
    for b, poison in ((one, True), (clean, False)):
        b.gradient.total_SP.copy_(gradient)
        if poison:
            b.gradient.total_SP[1, 5] = torch.nan
        b.step(torch.arange(3))
    assert torch.isnan(one.values_SP[1]).all()
    assert torch.equal(one.values_SP[[0, 2]], clean.values_SP[[0, 2]])


def test_reset_puts_slots_back_and_no_others() -> None:
    one, every = bank(3), torch.arange(3)
    held = one.state(every, moments=False)
    held_all = one.state(every, moments=True)
    one.gradient.total_SP += 1.0
    one.step(torch.arange(3))
    moved = one.state(every, moments=True)
    assert not torch.equal(moved["values"], held["values"]), "state is a copy"
    one.gradient.total_SP += 2.0
    one.reset(torch.tensor([0, 2]), {n: t[[0, 2]] for n, t in held.items()})
    now = one.state(every, moments=True)
    for name in now:
        assert torch.equal(now[name][1], moved[name][1])
    assert torch.equal(now["values"][[0, 2]], held["values"][[0, 2]])
    assert now["moment1"][[0, 2]].abs().max() == 0.0
    assert now["moment2"][[0, 2]].abs().max() == 0.0
    assert now["steps"].tolist() == [0, 1, 0]
    assert one.gradient.total_SP.sum(1).tolist() == [0.0, 2.0 * WIDTH, 0.0]
    one.reset(torch.arange(3), moved)
    assert all(torch.equal(one.state(every, True)[n], moved[n]) for n in moved), "moments come back"
    one.reset(every[:0], {n: t[:0] for n, t in held_all.items()})
    assert all(torch.equal(one.state(every, True)[n], moved[n]) for n in moved), "nobody is nobody"


@pytest.mark.parametrize("slots", [[1, 2, 3], [3, 2, 1], [1, 3, 4], [2], []])
def test_neighbours_are_copied_as_others_are(slots: list[int]) -> None:
    own = bank(5)
    before, at = own.values_SP.clone(), torch.tensor(slots, dtype=torch.int64)
    state = own.state(at, True)
    assert torch.equal(state["values"], before[at])
    state["values"] += 1
    assert torch.equal(own.values_SP, before), "a state is a copy"
    own.moment1_SP += 1
    own.gradient.total_SP += 1
    own.reset(at, {"values": state["values"]})
    before[at] += 1
    assert torch.equal(own.values_SP, before)
    fresh = torch.ones(5)
    fresh[at] = 0
    assert torch.equal(own.moment1_SP[:, 0], fresh)
    assert torch.equal(own.gradient.total_SP[:, -1], fresh)


def test_finite_rows() -> None:
    values = numbers(4, 7)
    assert finite_rows(values) == [True] * 4
    values[1, 3], values[3, 0] = torch.nan, -torch.inf
    values[2] = 3e38  # their sum is not finite
    assert finite_rows(values) == [True, False, True, False]
    assert finite_rows(values[:0]) == []


def test_a_row_is_cut_to_its_rank() -> None:
    flat = torch.arange(1.0, 3 * WIDTH + 1).reshape(3, WIDTH)
    held = flat.clone()
    cut_(views(flat, SITES, 2), torch.tensor([2, 0]), torch.tensor([1, 2]))
    assert torch.equal(flat[:2], held[:2])
    for (a, b), (a_was, b_was) in zip(views(flat, SITES, 2), views(held, SITES, 2), strict=True):
        assert torch.equal(a[2, 0], a_was[2, 0])
        assert torch.equal(b[2, :, 0], b_was[2, :, 0])
        assert not a[2, 1].any()
        assert not b[2, :, 1].any()


def test_what_is_behind_a_rank_stays_zero_through_training() -> None:
    """As leaves of `LoraLinear`, with everything that AdamW has."""
    train = TrainConfig(learning_rate=0.1, weight_decay=0.1, clip=1.0)
    both = [Bank(ALIGNED[:1], LoraSpec(r=3), train, 2) for _ in range(2)]
    for one, ranks in zip(both, ([2, 3], [3, 3]), strict=True):
        one.set_ranks(torch.arange(2), ranks)
        one.reset(torch.arange(2), {"values": numbers(2, 3 * (16 + 32), seed=9)})
    base = torch.nn.Linear(16, 32)
    layer, slots = LoraLinear(base, both[0].spec.scaling), torch.tensor([0, 1, 1])
    for step in range(10):
        for one in both:
            pairs = one.gather(slots, train=True)
            layer.pairs = tuple(one.scale(slots, pairs))
            layer(numbers(3, 5, 16, seed=step)).square().sum().backward()
            one.gradient.add(slots, pairs)
            one.step(torch.arange(2))
    mixed, equal = both
    assert torch.equal(mixed.values_SP[1], equal.values_SP[1])
    assert not torch.equal(mixed.values_SP[0], equal.values_SP[0])
    for tensor in (mixed.values_SP, mixed.moment1_SP, mixed.moment2_SP):
        ((a, b),) = views(tensor, ALIGNED[:1], 3)
        assert not a[0, 2].any()
        assert not b[0, :, 2].any()
        assert a[0, :2].all()
        assert b[0, :, :2].all()


@pytest.mark.parametrize("cached", [10, 300, 2**17])
def test_a_step_is_of_ones_own_rank(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit torch's AdamW on the row, and what is behind the rank is not touched."""
    monkeypatch.setattr("fellray.platform.bank.CACHED", cached)
    train = TrainConfig(learning_rate=0.03, weight_decay=0.1, clip=2.0)
    one, ranks = Bank(ALIGNED, LoraSpec(r=4), train, 5), [4, 1, 3, 1, 2]
    one.set_ranks(torch.arange(5), ranks)
    one.reset(torch.arange(5), {"values": numbers(5, 4 * 112, seed=9)})
    theirs = [torch.nn.Parameter(row.clone()) for row in one.values_SP]
    optimizers = [torch.optim.AdamW([p], lr=0.03, weight_decay=0.1, fused=True) for p in theirs]
    mine = torch.ones(5, 4 * 112)
    cut_(views(mine, ALIGNED, 4), torch.arange(5), torch.tensor(ranks))
    for step, present in enumerate([[0, 1, 2, 3, 4], [3, 1, 4], [2], [4, 0, 1, 3]]):
        gradient = numbers(5, 4 * 112, seed=step) * mine
        one.gradient.total_SP[present] = gradient[present]
        one.step(torch.tensor(present))
        for slot in present:
            norm = gradient[slot].norm()
            theirs[slot].grad = gradient[slot] * (2.0 / (norm + 1e-6)).clamp(max=1.0)
            optimizers[slot].step()
    for slot in range(5):
        assert torch.equal(one.values_SP[slot], theirs[slot].detach()), slot
        assert torch.equal(one.moment2_SP[slot], optimizers[slot].state[theirs[slot]]["exp_avg_sq"])
    assert not one.gradient.total_SP.any()

    behind = mine == 0
    for tensor in (one.values_SP, one.moment1_SP, one.gradient.total_SP):
        tensor[behind] = 7.0
    held = one.values_SP.clone()
    one.step(torch.arange(5))
    for tensor in (one.values_SP, one.moment1_SP):
        assert (tensor[behind] == 7.0).all()
    assert (one.values_SP != held)[~behind].all()


@pytest.mark.parametrize("rslora", [False, True])
def test_a_smaller_rank_has_its_own_scale(rslora: bool) -> None:
    spec = LoraSpec(r=4, lora_alpha=6.0, use_rslora=rslora)
    one = Bank(SITES, spec, TrainConfig(), 2)
    slots = torch.tensor([1, 0])
    pairs = one.gather(slots, train=False)
    assert one.scale(slots, pairs) is pairs, "nothing is computed where all have one rank"
    one.set_ranks(torch.tensor([0]), [1])
    one.reset(torch.arange(2), {"values": numbers(2, 2 * WIDTH)})
    for (a, b), (a_0, b_0) in zip(
        one.scale(slots, one.gather(slots, False)), one.gather(slots, False), strict=True
    ):
        assert torch.equal(a, a_0)
        assert torch.equal(b[0], b_0[0])
        torch.testing.assert_close(b[1] * spec.scaling, b_0[1] * spec.scaling_of(1))
        assert b_0[1].any()


def test_a_part_without_adapters_is_a_bank_without_columns() -> None:
    none = Bank([], SPEC, TrainConfig(clip=1.0), 2)
    none.gradient.add(torch.tensor([0, 1]), none.gather(torch.tensor([0, 1]), train=True))
    none.step(torch.arange(2))
    assert none.values_SP.shape == (2, 0)
    assert none.steps_S.tolist() == [1, 1]
    assert start([], SPEC, 0).shape == (0,)
