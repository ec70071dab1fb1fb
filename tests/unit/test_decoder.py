"""A decoder cut in three is the decoder: logits and gradients, whole rows and rows that go on.

Shapes: n rows of one padded length T, L real tokens, d width, K clients, P parameters of one.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fellray.platform.adapters import views
from fellray.platform.caches import Cache, Sight, Stretches
from fellray.platform.causal import CausalBlocks, Look
from fellray.platform.decoder import check_decoder
from fellray.platform.encoder import Backbone, load_backbone
from fellray.platform.errors import FellrayError
from fellray.platform.kernel import Loras
from fellray.platform.lanes import Lanes
from fellray.platform.model_config import LoraSpec, ModelConfig
from fellray.platform.packed import Batch
from fellray.platform.rows import Rows
from fellray.platform.split import cut_model, plan_cut
from fellray.platform.trunk import pack

FAMILIES = ("llama", "qwen2", "qwen3")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Make = Callable[[str], Path]


def config(**more: object) -> ModelConfig:
    return ModelConfig(**{"lora": LoraSpec(r=4, target_modules=EVERY), **more})


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert wanted.norm() > 0
    assert (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_together_are_the_model(family: str, tiny_decoder: Make) -> None:
    """Logits and the gradients of all embeddings, rows of two lengths padded at their end."""
    theirs = AutoModelForCausalLM.from_pretrained(tiny_decoder(family)).eval()
    parts = cut_model(load_backbone(str(tiny_decoder(family))), config())
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    labels = ids.masked_fill(~mask, -100)
    wanted = theirs(input_ids=ids, attention_mask=mask.long(), labels=labels)
    leaf = parts.bottom.embeddings(ids).detach().requires_grad_()
    h = parts.bottom.blocks(leaf, mask, ())
    top = parts.top(parts.trunk(h, mask, ()), mask, ())
    assert parts.top.head is not None
    logits = torch.stack([parts.top.head(states) for states in top])
    close(logits[mask].detach(), wanted.logits[mask].detach())
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    close(loss.detach(), wanted.loss.detach())
    loss.backward()
    theirs_leaf = theirs.get_input_embeddings()(ids).detach().requires_grad_()
    theirs(inputs_embeds=theirs_leaf, attention_mask=mask.long(), labels=labels).loss.backward()
    close(leaf.grad[mask], theirs_leaf.grad[mask])


@pytest.mark.parametrize("family", FAMILIES)
def test_either_side_alone_is_enough_for_its_parts(family: str, tiny_decoder: Make) -> None:
    backbone = load_backbone(str(tiny_decoder(family)))
    cut = plan_cut(backbone, config())
    client = backbone.select(cut.prefixes("bottom") + cut.prefixes("top"))
    server = backbone.select(cut.prefixes("trunk"))
    assert not any("embed" in name or "lm_head" in name for name in server.arrays)
    whole, ours, far = (cut_model(b, config()) for b in (backbone, client, server))
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool)
    h = far.trunk(ours.bottom(ids, mask, ()), mask, ())
    wanted = whole.top(whole.trunk(whole.bottom(ids, mask, ()), mask, ()), mask, ())
    states = ours.top(h, mask, ())
    assert torch.equal(states, wanted)
    assert ours.top.head is not None
    assert whole.top.head is not None
    assert torch.equal(ours.top.head(states[0]), whole.top.head(wanted[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_where_the_weights_are(family: str, tiny_decoder: Make) -> None:
    backbone = load_backbone(str(tiny_decoder(family)))
    parts = cut_model(backbone, config())
    for part, blocks in (("bottom", parts.bottom.blocks), ("trunk", parts.trunk)):
        for site, module in zip(parts.cut.sites[part], blocks.adapted, strict=True):
            array = backbone.arrays[f"{site.path}.weight"]
            assert array.shape == (site.d_out, site.d_in)
            assert torch.equal(module.base.weight, torch.from_numpy(array)), site.path


def lay(lengths: list[int], lane: list[int], ranks: Tensor) -> Lanes:
    return Lanes(torch.tensor(lengths), torch.tensor(lane), 16, ranks)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_blocks_are_theirs(family: str, tiny_decoder: Make) -> None:
    """Output, input gradient and adapter gradients on lanes against autograd over the modules."""
    backbone = load_backbone(str(tiny_decoder(family)))
    parts = cut_model(backbone, config(cut=0, top=0))
    sites, packed = parts.cut.sites["trunk"], pack(parts.trunk)
    lengths, lane = [3, 20, 17, 40, 1, 16], [0, 0, 1, 2, 2, 2]
    h, g = numbers(sum(lengths), 32, seed=0), numbers(sum(lengths), 32, seed=1)
    values = numbers(3, sum(site.num_parameters(4) for site in sites), seed=2) * 0.1
    lanes = lay(lengths, lane, torch.full((3,), 4))
    gradient = torch.zeros_like(values)
    scaling = config().lora.scaling_of
    loras = Loras(
        sites, lanes.stacks, [4] * len(lanes.stacks), scaling, lanes.order_K, values, gradient
    )
    batch = Batch(lanes, [loras])
    y, saved = packed.forward(lanes.spread(h), batch, keep=True)
    assert sum(t.nbytes for s in saved for t in vars(s).values()) == packed.measure(len(y))
    down = packed.backward(lanes.spread(g), saved, batch)

    rows = Rows(torch.tensor(lengths), 16)
    leaf, theta = h.clone().requires_grad_(), values.clone().requires_grad_()
    pairs = views(theta, sites, 4)
    outputs = []
    for group in rows.groups:
        own = torch.tensor(lane)[group.rows_n]
        adapters = [[(a[own], b[own]) for a, b in pairs]]
        outputs.append(parts.trunk(rows.pad(leaf, group), group.mask_nT, adapters))
    wanted = rows.pack(outputs)
    wanted.backward(g)
    close(lanes.collect(y), wanted.detach())
    close(lanes.collect(down), leaf.grad)
    close(gradient, theta.grad)


def test_alone_or_among_strangers(tiny_decoder: Make) -> None:
    """A client's numbers do not depend on who shares its batch, bit for bit."""
    parts = cut_model(load_backbone(str(tiny_decoder("qwen3"))), config(cut=0, top=0))
    sites, packed = parts.cut.sites["trunk"], pack(parts.trunk)
    sizes = [[16], [40, 7], [1], [33, 48, 5]]
    values = numbers(4, sum(site.num_parameters(4) for site in sites), seed=2) * 0.1
    ends = torch.tensor([0, *map(sum, sizes)]).cumsum(0).tolist()
    h, g = numbers(ends[-1], 32, seed=0), numbers(ends[-1], 32, seed=1)

    def run(own: list[int]) -> list[Tensor]:
        lengths = [n for k in own for n in sizes[k]]
        lanes = lay(
            lengths, [i for i, k in enumerate(own) for _ in sizes[k]], torch.full((len(own),), 4)
        )
        gradient = torch.zeros_like(values)
        slots = torch.tensor(own)[lanes.order_K]
        ranks = [4] * len(lanes.stacks)
        loras = Loras(sites, lanes.stacks, ranks, config().lora.scaling_of, slots, values, gradient)
        batch, tokens = Batch(lanes, [loras]), [slice(ends[k], ends[k + 1]) for k in own]
        y, saved = packed.forward(lanes.spread(torch.cat([h[t] for t in tokens])), batch, True)
        down = packed.backward(lanes.spread(torch.cat([g[t] for t in tokens])), saved, batch)
        return [lanes.collect(y), lanes.collect(down), gradient]

    together = run([0, 1, 2, 3])
    for k in range(4):
        part, alone = slice(ends[k], ends[k + 1]), run([k])
        assert torch.equal(alone[0], together[0][part])
        assert torch.equal(alone[1], together[1][part])
        assert torch.equal(alone[2][k], together[2][k])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_go_on_are_whole_rows(family: str, tiny_decoder: Make) -> None:
    """Three stretches with caches, rows that are copied and dropped between: modules and lanes."""
    parts = cut_model(load_backbone(str(tiny_decoder(family))), config(cut=0, top=0))
    packed = CausalBlocks(parts.trunk)
    first, second, third = [20, 5, 16], [1, 3, 1, 1], [2, 1]
    follow, last = torch.tensor([1, 0, 1, 2]), torch.tensor([3, 1])
    texts = [numbers(n, 32, seed=n) for n in first]
    new = [
        [numbers(n, 32, seed=100 * i + j) for j, n in enumerate(own)]
        for i, own in enumerate((second, third))
    ]
    steps = [(None, texts), (follow, new[0]), (last, new[1])]
    ours, far = Cache(3), Cache(3)
    for parent, pieces in steps:
        if parent is not None:
            texts = [
                torch.cat([texts[p], piece])
                for p, piece in zip(parent.tolist(), pieces, strict=True)
            ]
            ours.follow(parent)
            far.follow(parent)
        lengths = torch.tensor([len(piece) for piece in pieces])
        rows = Stretches(ours.lengths_N, lengths, 16)
        h = torch.cat(pieces)
        got = rows.pack(
            [parts.trunk.extend(rows.pad(h, s), Sight(ours, s), (), None) for s in rows.stretches]
        )
        lanes = lay(lengths.tolist(), [0] * len(lengths), torch.tensor([4]))
        on_lanes = packed.extend(lanes.spread(h), Batch(lanes, []), [Look(rows, far)])
        for cache in (ours, far):
            cache.lengths_N = cache.lengths_N + lengths
        assert ours.lengths_N.tolist() == [len(text) for text in texts]
        for text, size, found, other in zip(
            texts,
            lengths.tolist(),
            got.split(lengths.tolist()),
            lanes.collect(on_lanes).split(lengths.tolist()),
            strict=True,
        ):
            whole = parts.trunk(text[None], torch.ones(1, len(text), dtype=torch.bool), ())
            close(found, whole[0, -size:])
            close(other, whole[0, -size:])


def test_what_would_be_computed_wrongly_is_refused(tiny_decoder: Make) -> None:
    sound = load_backbone(str(tiny_decoder("qwen2")))

    def like(**more: object) -> Backbone:
        return Backbone("mine", "", sound.config | more, {})

    check_decoder(sound)
    with pytest.raises(FellrayError, match=r"mine.*sliding windows"):
        check_decoder(like(layer_types=["full_attention", "sliding_attention"]))
    with pytest.raises(FellrayError, match=r"\(dynamic\) change with the length"):
        check_decoder(like(rope_parameters={"rope_type": "dynamic"}))
    with pytest.raises(FellrayError, match=r"'query' is no projection .* known: q_proj, k_proj"):
        plan_cut(sound, ModelConfig())
