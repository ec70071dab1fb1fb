"""FELLRec's formulas against the published numbers (promise 8), and what must hold of any."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fellray.platform.aggregation import Meta, centre, cosine, describe, name_layers, reduce
from fellray.platform.config import parse
from fellray.platform.errors import FellrayError
from fellray.platform.fellrec import (
    PUBLISHED,
    Defect,
    Fellrec,
    affine_attention,
    learning_degree,
    loss_share,
    mixing_matrix,
    mixing_matrix_in_place,
    published_exponent,
    softmax_attention,
    top_k_attention,
)

# Means of the training losses logged for clients 0..4 in the first round of the published runs.
LOSSES = [2.0908, 2.0800, 2.2114, 2.1523, 2.0894]
ALPHA, TEMPERATURE = 0.7, 0.05
UNIFORM = [2.0] * 5
# beta, 0-based epoch, w as intended, w as the released code computes it
DEGREES = [
    (1, 0, [1.000, 1.000, 0.797, 0.998, 1.000], [1.000, 1.000, 0.797, 0.998, 1.000]),
    (1, 1, [1.000, 1.000, 0.935, 1.000, 1.000], [1.000, 1.000, 0.935, 1.000, 1.000]),
    (5, 0, [0.845, 0.860, 0.644, 0.748, 0.847], [0.845, 0.860, 0.644, 0.748, 0.847]),
    (5, 1, [0.975, 0.983, 0.683, 0.872, 0.977], [1.000, 1.000, 0.830, 1.000, 1.000]),
    (5, 2, [0.999, 1.000, 0.722, 0.952, 0.999], [1.000, 1.000, 0.952, 1.000, 1.000]),
    (5, 4, [1.000, 1.000, 0.797, 0.998, 1.000], [1.000] * 5),
    (5, 9, [1.000, 1.000, 0.935, 1.000, 1.000], [1.000] * 5),
]
UNIFORM_DEGREES = [
    (0, 0.747, 0.747),
    (1, 0.870, 1.0),
    (2, 0.951, 1.0),
    (4, 0.998, 1.0),
    (9, 1.0, 1.0),
]

losses = arrays(np.float64, 4, elements=st.floats(0.1, 10.0))
thetas = arrays(np.float32, (4, 6), elements=st.floats(-5, 5, width=32))


def at_three_decimals(values: Tensor) -> list[float]:
    return [round(v, 3) for v in values.tolist()]


def meta(losses: Sequence[float], t: int = 1, seed: int = 0) -> Meta:
    names = [f"c{i}" for i in range(len(losses))]
    draw = torch.Generator().manual_seed(seed)
    theta, start = torch.randn(2, len(losses), 30, generator=draw)
    return describe(t, names, losses, [8] * len(losses), theta, start)


def degree(method: Fellrec, losses: Sequence[float], t: int) -> Tensor:
    return method.plan(meta(losses, t)).notes["learning_degree"]


def test_share_of_the_published_losses() -> None:
    share = loss_share(torch.tensor(LOSSES), TEMPERATURE)
    assert [round(s, 4) for s in share.tolist()] == [0.0576, 0.0464, 0.6428, 0.1971, 0.0560]
    assert share.dtype == torch.float64


@pytest.mark.parametrize(("beta", "epoch", "intended", "published"), DEGREES)
def test_learning_degree_intended_and_published(
    beta: int, epoch: int, intended: list[float], published: list[float]
) -> None:
    ours = Fellrec(alpha=ALPHA, beta=beta, temperature=TEMPERATURE)
    theirs = Fellrec(alpha=ALPHA, beta=beta, temperature=TEMPERATURE, as_published=True)
    assert at_three_decimals(degree(ours, LOSSES, epoch + 1)) == intended
    assert at_three_decimals(degree(theirs, LOSSES, epoch + 1)) == published


@pytest.mark.parametrize(("epoch", "intended", "published"), UNIFORM_DEGREES)
def test_learning_degree_of_equal_losses(epoch: int, intended: float, published: float) -> None:
    ours, theirs = Fellrec(alpha=ALPHA), Fellrec(alpha=ALPHA, beta=5, as_published=True)
    assert at_three_decimals(degree(ours, UNIFORM, epoch + 1)) == [intended] * 5
    assert at_three_decimals(degree(theirs, UNIFORM, epoch + 1)) == [published] * 5


def test_the_defaults_are_the_papers() -> None:
    method = Fellrec()
    assert (method.alpha, method.beta, method.temperature) == (0.7, 5.0, 0.05)
    assert (method.as_published, method.attention, method.similarity) == (False, "affine", "update")


def test_as_published_has_the_released_scripts_settings_unless_others_are_given() -> None:
    """Methods 5: alpha 0.7, beta 1, temperature 0.05."""
    script = Fellrec(as_published=True)
    assert (script.alpha, script.beta, script.temperature) == (0.7, 1.0, 0.05)
    assert script == Fellrec(as_published=True, beta=1)
    assert Fellrec(as_published=True, beta=5).beta == 5.0
    assert Fellrec(as_published=False).beta == 5.0
    settled = parse({"method": {"as_published": True}}, "test")
    assert settled.method == script
    kept = settled.model_dump(mode="json") | {"method": {"as_published": True, "beta": 5.0}}
    assert parse(kept, "test").method == Fellrec(as_published=True, beta=5)


def test_clients_overwritten_in_place() -> None:
    """Methods 1.4: all attention 0.5, w = 1, five clients one after the other."""
    half = torch.full((5, 5), 0.5, dtype=torch.float64)
    mixing = mixing_matrix_in_place(lambda _: half, torch.ones(5), 5)
    assert [at_three_decimals(row) for row in mixing] == [
        [0.333, 0.167, 0.167, 0.167, 0.167],
        [0.056, 0.361, 0.194, 0.194, 0.194],
        [0.065, 0.088, 0.394, 0.227, 0.227],
        [0.076, 0.103, 0.126, 0.431, 0.265],
        [0.088, 0.120, 0.147, 0.170, 0.475],
    ]
    correct = mixing_matrix(half, torch.ones(5))
    for c in range(5):
        wanted = [0.333 if j == c else 0.167 for j in range(5)]
        assert at_three_decimals(correct[c]) == wanted


def test_in_place_at_a_common_start_is_hardly_better() -> None:
    near = torch.full((5, 5), 0.99, dtype=torch.float64)
    sequential = mixing_matrix_in_place(lambda _: near, torch.ones(5), 5)
    assert round(sequential[4, 4].item(), 3) == 0.415
    assert round(mixing_matrix(near, torch.ones(5))[4, 4].item(), 3) == 0.202


def test_in_place_equals_the_loop_over_stored_weights() -> None:
    """The matrix stands for what the released loop does to the tensors, similarities included."""
    draw = torch.Generator().manual_seed(3)
    theta, start = torch.randn(2, 4, 20, generator=draw, dtype=torch.float64)
    names = ["a", "b", "c", "d"]
    method = Fellrec(as_published=True, beta=5.0)
    seen = describe(2, names, [2.0, 2.1, 1.9, 2.2], [1] * 4, theta, start)
    plan = method.plan(seen)
    stored = theta.clone()
    w = plan.notes["learning_degree"]
    for c in range(4):
        norm = stored / stored.norm(dim=1, keepdim=True)
        a = (1 + norm @ norm[c]) / 2 * w[c]
        a[c] = 1.0
        stored[c] = (a / a.sum()) @ stored
    torch.testing.assert_close(reduce(plan, theta), stored, rtol=0, atol=1e-12)


def test_as_published_differs_from_the_default() -> None:
    """Exponent (at beta 5), order of overwriting and the weights compared: each shows."""
    seen = meta(LOSSES, t=2)
    default, theirs = Fellrec().plan(seen), Fellrec(as_published=True, beta=5).plan(seen)
    assert not torch.allclose(default.mixing_CC, theirs.mixing_CC, atol=1e-3)
    assert published_exponent(2, 5) == pytest.approx(1.2)
    assert published_exponent(1, 5) == pytest.approx(1 / 5)
    raw = seen.gram["raw"]
    assert not torch.allclose(cosine(raw), cosine(seen.gram["update"]), atol=1e-3)
    unlike = Meta(seen.round, seen.clients, seen.losses_C, seen.samples_C, {"raw": raw})
    again = Fellrec(as_published=True, beta=5).plan(unlike)
    assert torch.equal(again.mixing_CC, theirs.mixing_CC)


def test_as_published_with_beta_one_computes_w_and_never_uses_it() -> None:
    tame, wild = Fellrec(as_published=True), Fellrec(as_published=True, alpha=1e-6)
    assert degree(wild, LOSSES, 1).max() < 1e-4, "w is computed, and would tell"
    assert torch.equal(tame.plan(meta(LOSSES)).mixing_CC, wild.plan(meta(LOSSES)).mixing_CC)
    fixed, used = (Fellrec(as_published=True, beta=5, alpha=alpha) for alpha in (ALPHA, 1e-6))
    assert not torch.allclose(fixed.plan(meta(LOSSES)).mixing_CC, used.plan(meta(LOSSES)).mixing_CC)


@given(losses, st.integers(1, 40), st.floats(0.5, 20.0))
def test_degree_falls_with_the_loss_and_rises_with_time(
    values: np.ndarray, t: int, beta: float
) -> None:
    share = loss_share(torch.from_numpy(values), 0.5)
    now = learning_degree(share, ALPHA, t / beta)
    later = learning_degree(share, ALPHA, (t + 1) / beta)
    assert bool(((now > 0) & (now <= 1)).all())
    assert bool((later >= now).all())
    by_loss = now[torch.from_numpy(np.argsort(values, kind="stable"))]
    assert bool((by_loss.diff() <= 1e-12).all())


def test_degree_neither_overflows_nor_vanishes() -> None:
    """One client takes the whole share at a temperature made for other losses."""
    share = loss_share(torch.tensor([9.0, 1.0, 1.0]), 0.05)
    degree = learning_degree(share, ALPHA, 40 / 5)
    assert degree.tolist() == [pytest.approx(np.tanh(0.7)), 1.0, 1.0]


@given(thetas, losses, st.integers(1, 30), st.sampled_from(["affine", "softmax", "top_k"]))
def test_rows_sum_to_one_and_take_from_nobody_negatively(
    theta: np.ndarray, values: np.ndarray, t: int, attention: str
) -> None:
    start = torch.zeros(4, 6)
    seen = describe(t, list("abcd"), values.tolist(), [1] * 4, torch.from_numpy(theta), start)
    for published in (False, True):
        method = Fellrec(attention=attention, k=2, beta=5, as_published=published)
        mixing = method.plan(seen).mixing_CC
        torch.testing.assert_close(mixing.sum(1), torch.ones(4, dtype=torch.float64))
        assert float(mixing.min()) >= 0.0
        assert float(mixing.max()) <= 1.0 + 1e-12


@given(arrays(np.float32, 6, elements=st.floats(-5, 5, width=32)), losses, st.booleans())
def test_identical_clients_stay_what_they_are(
    one: np.ndarray, values: np.ndarray, published: bool
) -> None:
    theta = torch.from_numpy(one).repeat(4, 1)
    seen = describe(1, list("abcd"), values.tolist(), [1] * 4, theta, torch.zeros(4, 6))
    mixed = reduce(Fellrec(beta=5, as_published=published).plan(seen), theta)
    torch.testing.assert_close(mixed, theta, rtol=1e-6, atol=1e-6)


def test_full_attention_and_degree_is_the_plain_mean() -> None:
    mixing = mixing_matrix(torch.ones(4, 4, dtype=torch.float64), torch.ones(4))
    assert mixing.tolist() == [[0.25] * 4] * 4


def test_without_degree_everyone_keeps_its_own() -> None:
    attention = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert mixing_matrix(attention, torch.zeros(4)).tolist() == torch.eye(4).tolist()
    hesitant = Fellrec(alpha=1e-9).plan(meta(UNIFORM))
    assert float(hesitant.own_weight_C.min()) > 1 - 1e-7


def test_mixing_matrix_by_hand() -> None:
    attention = torch.tensor([[1.0, 0.5, 0.25], [0.5, 1.0, 0.0], [0.25, 0.0, 1.0]])
    mixing = mixing_matrix(attention.double(), torch.tensor([1.0, 0.5, 0.0]).double())
    assert mixing[0].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert mixing[1].tolist() == pytest.approx([0.2, 0.8, 0.0])
    assert mixing[2].tolist() == [0.0, 0.0, 1.0]


def test_affine_attention_by_hand() -> None:
    similarity = torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    assert affine_attention(similarity).tolist() == [[1.0, 0.0], [0.5, 1.0]]


def test_softmax_attention_by_hand() -> None:
    similarity = torch.tensor([[1.0, 0.2, 0.1], [0.3, 1.0, 0.3], [0.0, 0.0, 1.0]]).double()
    attention = softmax_attention(similarity, tau=0.1)
    e = np.exp(1.0)
    assert attention[0].tolist() == pytest.approx([0.0, e / (e + 1), 1 / (e + 1)])
    assert attention[1].tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert similarity[0, 0] == 1.0, "the argument is left alone"
    assert softmax_attention(torch.ones(1, 1), 0.1).tolist() == [[0.0]]


def test_top_k_attention_by_hand() -> None:
    similarity = torch.tensor(
        [[1.0, 0.2, 0.6, 0.2], [0.0, 1.0, 0.0, 0.0], [0.6, 0.8, 1.0, -1.0], [0.2, 0.0, -1.0, 1.0]]
    ).double()
    attention = top_k_attention(similarity, k=2)
    assert attention[0].tolist() == pytest.approx([0.0, 0.6, 0.8, 0.0]), "a tie: the smaller id"
    assert attention[1].tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0])
    assert attention[2].tolist() == pytest.approx([0.8, 0.9, 0.0, 0.0])
    everyone = top_k_attention(similarity, k=9)
    assert torch.equal(everyone, affine_attention(similarity).fill_diagonal_(0.0))


def test_one_client_alone_keeps_itself() -> None:
    for attention in ("affine", "softmax", "top_k"):
        for published in (False, True):
            method = Fellrec(attention=attention, as_published=published)
            assert method.plan(meta([2.0])).mixing_CC.tolist() == [[1.0]]


def test_nobody_left_is_a_plan_for_nobody() -> None:
    for attention in ("affine", "softmax", "top_k"):
        for published in (False, True):
            method = Fellrec(attention=attention, as_published=published)
            assert method.plan(meta([])).mixing_CC.shape == (0, 0)
    assert Fellrec(standardise_losses=True).plan(meta([])).mixing_CC.shape == (0, 0)


@given(losses, st.floats(0.01, 100.0), st.floats(-1.0, 1.0))
def test_standardised_losses_do_not_depend_on_the_losss_scale(
    values: np.ndarray, scale: float, shift: float
) -> None:
    if values.std() < 1e-3:
        return
    method = Fellrec(standardise_losses=True)
    one = degree(method, values.tolist(), 3)
    other = degree(method, (values * scale + shift).tolist(), 3)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    spread = loss_share(torch.from_numpy(values / values.std()), 1.0)
    torch.testing.assert_close(one, learning_degree(spread, ALPHA, 3 / 5))


def test_equal_losses_standardised_are_equal_shares() -> None:
    assert at_three_decimals(degree(Fellrec(standardise_losses=True), UNIFORM, 1)) == [0.747] * 5


# --- defects one at a time, and what is ours ------------------------------------------------------


@pytest.mark.parametrize("defect", get_args(Defect))
def test_every_defect_alone_changes_something_and_nothing_else(defect: Defect) -> None:
    """At a round and a beta at which each shows; `own_start` is no matter of the plan."""
    beta = 1 if defect == "unused_degree" else 5
    seen = meta(LOSSES, t=2)
    intended, broken = Fellrec(beta=beta), Fellrec(beta=beta, defects=(defect,))
    same_degree = torch.equal(degree(intended, LOSSES, 2), degree(broken, LOSSES, 2))
    same_matrix = torch.equal(intended.plan(seen).mixing_CC, broken.plan(seen).mixing_CC)
    assert same_degree == (defect not in ("exponent", "tiny_losses"))
    assert same_matrix == (defect == "own_start")
    assert broken.begins_alike() == (defect != "own_start")
    assert list(broken.compares()) == ["raw" if defect == "raw_weights" else "update"]


def test_as_published_is_all_defects_of_the_language_model() -> None:
    whole, named = Fellrec(as_published=True), Fellrec(beta=1, defects=tuple(sorted(PUBLISHED)))
    assert "tiny_losses" not in PUBLISHED
    assert not whole.begins_alike()
    for t in (1, 4):
        seen = meta(LOSSES, t=t)
        assert torch.equal(whole.plan(seen).mixing_CC, named.plan(seen).mixing_CC)
        without = Fellrec(beta=1, defects=tuple(PUBLISHED - {"in_place"}))
        assert not torch.allclose(without.plan(seen).mixing_CC, named.plan(seen).mixing_CC)


def test_the_exponent_alone_by_hand() -> None:
    broken = Fellrec(defects=("exponent",))
    assert at_three_decimals(degree(broken, LOSSES, 2)) == [1.000, 1.000, 0.830, 1.000, 1.000]


def test_tiny_losses_make_all_degrees_equal() -> None:
    """8 histories each: 2.0908 / 8 / 8 and so on, over a temperature of 0.05."""
    found = degree(Fellrec(defects=("tiny_losses",)), LOSSES, 1)
    share = torch.softmax(torch.tensor(LOSSES, dtype=torch.float64) / 64 / 0.05, dim=0)
    torch.testing.assert_close(found, learning_degree(share, ALPHA, 1 / 5))
    assert found.max() - found.min() < 0.01
    assert degree(Fellrec(), LOSSES, 1).max() - degree(Fellrec(), LOSSES, 1).min() > 0.2


def test_in_place_alone_compares_what_the_earlier_ones_became() -> None:
    """Two clients by hand, w = 1: the second listens to the first one's mixture."""
    theta = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    seen = describe(1, ["a", "b"], [1.0, 1.0], [1, 1], theta, torch.zeros_like(theta))
    method = Fellrec(alpha=1e6, defects=("in_place",))
    # cosine 0, attention 1/2: the first is 2/3 itself; then a cosine of 1 / sqrt(2)
    first = torch.tensor([2 / 3, 1 / 3]).double()
    mixed = first @ theta
    attention = (1 + mixed[1] / mixed.norm()) / 2
    second = (attention * first + torch.tensor([0.0, 1.0])) / (1 + attention)
    torch.testing.assert_close(method.plan(seen).mixing_CC, torch.stack([first, second]))


def test_centred_similarity_by_hand() -> None:
    """Three updates that share a large part: what is left are corners of a triangle."""
    corners = torch.tensor([[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]])
    theta = corners.double() + 100.0
    seen = describe(1, ["a", "b", "c"], [1.0] * 3, [1] * 3, theta, torch.zeros_like(theta))
    similar = cosine(centre(seen.gram["update"]))
    torch.testing.assert_close(similar, 1.5 * torch.eye(3).double() - 0.5, atol=1e-6, rtol=0)
    assert cosine(seen.gram["update"]).min() > 0.99
    # attention (1 - 1/2) / 2, degree 1 (alpha is huge)
    mixing = Fellrec(alpha=1e6, centred=True).plan(seen).mixing_CC
    assert mixing[0].tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6], abs=1e-6)


def test_two_clients_centred_are_opposites_and_keep_their_own() -> None:
    seen = meta([1.0, 2.0])
    assert Fellrec(centred=True).plan(seen).mixing_CC.tolist() == pytest.approx(torch.eye(2))


def test_every_layer_has_its_own_similarities() -> None:
    """Alike in the first projection, opposite in the second; A and B count together."""
    theta = torch.tensor([[1.0, 0.0, 5.0, 1.0], [1.0, 0.0, -5.0, -1.0]], dtype=torch.float64)
    blocks = {
        "q.lora_A": slice(0, 1),
        "q.lora_B": slice(1, 2),
        "v.lora_A": slice(2, 3),
        "v.lora_B": slice(3, 4),
    }
    assert name_layers(blocks) == {"q": slice(0, 2), "v": slice(2, 4)}
    args = (1, ["a", "b"], [1.0, 1.0], [1, 1], theta, torch.zeros_like(theta))
    method = Fellrec(alpha=1e6, per_layer=True)
    assert method.compares_layers()
    seen = describe(*args, method.compares(), blocks, by_layer=True)
    assert torch.equal(seen.gram["update"], describe(*args).gram["update"])
    plan = method.plan(seen)
    assert plan.blocks["q.lora_A"] is plan.blocks["q.lora_B"]
    mixed = reduce(plan, theta, blocks)
    assert mixed.tolist() == [[1.0, 0.0, 5.0, 1.0], [1.0, 0.0, -5.0, -1.0]]
    assert plan.blocks["q.lora_A"].mixing_CC.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert plan.own_weight_C.tolist() == [0.75, 0.75], "the record has the mean"


@pytest.mark.parametrize("num_clients", [1, 3, 7])
def test_products_compared_are_products_made(num_clients: int) -> None:
    """B A of every client and projection, made and multiplied out one by one."""
    rank, shapes = 2, {"q": (3, 4), "v": (5, 3)}
    blocks, at = {}, 0
    for layer, (d_in, d_out) in shapes.items():
        for factor, width in (("lora_A", rank * d_in), ("lora_B", rank * d_out)):
            blocks[f"{layer}.{factor}"] = slice(at, at + width)
            at += width
    theta = torch.from_numpy(np.random.default_rng(3).normal(size=(num_clients, at))).float()
    names, ones = [f"c{i}" for i in range(num_clients)], [1] * num_clients
    method = Fellrec(similarity="product", per_layer=True, alpha=1e6)
    assert method.mixes_products()
    args = (1, names, ones, ones, theta, theta, method.compares(), blocks)
    seen = describe(*args, by_layer=True, rank=rank)
    total = torch.zeros(num_clients, num_clients, dtype=torch.float64)
    for layer, (d_in, d_out) in shapes.items():
        a = theta[:, blocks[f"{layer}.lora_A"]].double().view(-1, rank, d_in)
        b = theta[:, blocks[f"{layer}.lora_B"]].double().view(-1, d_out, rank)
        made = (b @ a).flatten(1)
        torch.testing.assert_close(seen.layers[layer]["product"], made @ made.T)
        total += made @ made.T
    torch.testing.assert_close(seen.gram["product"], total)
    whole = describe(*args, rank=rank)
    assert torch.equal(whole.gram["product"], seen.gram["product"])
    assert whole.layers == {}
    other_factoring = theta.clone()  # A doubled and B halved: the same model
    for name, columns in blocks.items():
        other_factoring[:, columns] *= 2.0 if name.endswith("A") else 0.5
    same = describe(1, names, ones, ones, other_factoring, theta, ["product"], blocks, rank=rank)
    torch.testing.assert_close(same.gram["product"], total)


def test_layers_and_overwriting_do_not_go_together() -> None:
    with pytest.raises(FellrayError, match="in_place one order of overwriting"):
        parse({"method": {"kind": "fellrec", "per_layer": True, "defects": ["in_place"]}}, "x")


def test_without_layers_there_is_nothing_to_mix_by() -> None:
    assert Fellrec(per_layer=True).plan(meta([])).mixing_CC.shape == (0, 0)
