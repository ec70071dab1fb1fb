"""Blocks on lanes: transformers' own numbers, peft's gradients, nobody's bits but one's own.

Shapes: K clients, P parameters of one, L real tokens, d width.
"""

from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from fellray.platform.adapters import Site, views
from fellray.platform.encoder import MINILM, load_backbone
from fellray.platform.kernel import Loras
from fellray.platform.lanes import Lanes
from fellray.platform.model_config import LoraSpec, ModelConfig
from fellray.platform.packed import Batch, PackedBlocks
from fellray.platform.rows import Rows
from fellray.platform.split import Blocks, cut_model

EVERY = (
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


@dataclass(frozen=True)
class Model:
    """All blocks of an encoder as trunk."""

    blocks: Blocks
    packed: PackedBlocks
    sites: list[Site]
    spec: LoraSpec
    width: int


def model(name: str, targets: tuple[str, ...] = ("query", "value"), r: int = 4) -> Model:
    spec = LoraSpec(r=r, target_modules=targets)
    backbone = load_backbone(name)
    parts = cut_model(backbone, ModelConfig(name=name, cut=0, top=0, lora=spec))
    packed = PackedBlocks(parts.trunk)
    return Model(parts.trunk, packed, parts.cut.sites["trunk"], spec, backbone.dim)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(
    m: Model, sizes: list[list[int]], h_Ld: Tensor, g_Ld: Tensor, values_KP: Tensor, ranks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient [L, d], and the gradients of A and B [K, P]."""
    lengths = torch.tensor([length for own in sizes for length in own])
    lane = torch.tensor([k for k, own in enumerate(sizes) for _ in own])
    lanes = Lanes(lengths, lane, 16, ranks)
    own = [stack.rank for stack in lanes.stacks]
    gradient = torch.zeros_like(values_KP)
    loras = Loras(m.sites, lanes.stacks, own, m.spec.scaling_of, lanes.order_K, values_KP, gradient)
    batch = Batch(lanes, [loras])
    y, saved = m.packed.forward(lanes.spread(h_Ld), batch, keep=True)
    assert sum(t.nbytes for s in saved for t in vars(s).values()) == m.packed.measure(len(y))
    down = m.packed.backward(lanes.spread(g_Ld), saved, batch)
    return lanes.collect(y), lanes.collect(down), gradient


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert wanted.norm() > 0
    assert (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(
    ("encoder", "targets"),
    [("bert", EVERY), ("roberta", ("query", "value")), ("minilm", ("query", "value"))],
)
def test_transformers_own_forward_and_gradients(
    encoder: str, targets: tuple[str, ...], tiny_encoder: Path, tiny_roberta: Path
) -> None:
    names = {"bert": str(tiny_encoder), "roberta": str(tiny_roberta), "minilm": MINILM}
    m = model(names[encoder], targets)
    sizes = [[3, 20], [17], [40, 1, 16]]
    lane = torch.tensor([0, 0, 1, 2, 2, 2])
    tokens = sum(map(sum, sizes))
    h, g = numbers(tokens, m.width, seed=0), numbers(tokens, m.width, seed=1)
    size = sum(site.num_parameters(4) for site in m.sites)
    values = numbers(3, size, seed=2) * 0.1
    got = run(m, sizes, h, g, values, torch.full((3,), 4))

    rows = Rows(torch.tensor([length for own in sizes for length in own]), 16)
    leaf, theta = h.clone().requires_grad_(), values.clone().requires_grad_()
    pairs = views(theta, m.sites, 4)
    outputs = []
    for group in rows.groups:
        own = lane[group.rows_n]
        adapters = [[(a[own], b[own]) for a, b in pairs]]
        outputs.append(m.blocks(rows.pad(leaf, group), group.mask_nT, adapters))
    y = rows.pack(outputs)
    y.backward(g)
    for ours, theirs in zip(got, (y.detach(), leaf.grad, theta.grad), strict=True):
        close(ours, theirs)


def test_pefts_model_of_one_client(tiny_encoder: Path) -> None:
    """A client of rank 2 in a batch with one of rank 4, held against peft's own model."""
    m = model(str(tiny_encoder), ("query", "value"), r=4)
    sizes, ranks = [[16], [16]], torch.tensor([4, 2])
    values = numbers(2, sum(site.num_parameters(4) for site in m.sites), seed=2) * 0.3
    h, g = numbers(32, 32, seed=0), numbers(32, 32, seed=1)
    y, down, gradient = run(m, sizes, h, g, values, ranks)
    wide = views(gradient, m.sites, 4)
    assert all(not a[1, 2:].any() and not b[1, :, 2:].any() for a, b in wide)
    for client, r in enumerate((4, 2)):
        theirs = peft.get_peft_model(
            AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False),
            peft.LoraConfig(
                r=r, lora_alpha=16, target_modules=[s.path for s in m.sites], lora_dropout=0.0
            ),
        ).eval()
        pairs = [(a[client, :r], b[client, :, :r]) for a, b in views(values, m.sites, 4)]
        layers = [theirs.base_model.model.get_submodule(site.path) for site in m.sites]
        with torch.no_grad():
            for layer, (a, b) in zip(layers, pairs, strict=True):
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
        own = slice(16 * client, 16 * client + 16)
        leaf = h[None, own].clone().requires_grad_()
        out = leaf
        for block in theirs.base_model.model.encoder.layer:
            out = block(out, None)
        out.backward(g[None, own])
        close(y[own], out[0].detach())
        close(down[own], leaf.grad[0])
        wanted = [
            layer_grad.flatten()
            for layer in layers
            for layer_grad in (
                layer.lora_A["default"].weight.grad,
                layer.lora_B["default"].weight.grad,
            )
        ]
        found = [t for a, b in wide for t in (a[client, :r].flatten(), b[client, :, :r].flatten())]
        close(torch.cat(found), torch.cat(wanted))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ranks", [[8, 8, 8, 8, 8, 8], [4, 8, 16, 64, 8, 4]])
def test_alone_or_among_strangers(threads: int, ranks: list[int]) -> None:
    """MiniLM's weights: a client's output, input gradient and adapter gradient, bit for bit."""
    torch.set_num_threads(threads)
    m = model(MINILM, r=8)
    sizes = [[16], [40, 7], [16], [1], [33, 48, 5], [96]]
    size = sum(site.num_parameters(max(ranks)) for site in m.sites)
    values, own = numbers(6, size, seed=2) * 0.1, torch.tensor(ranks)
    ends = torch.tensor([0, *map(sum, sizes)]).cumsum(0).tolist()
    h, g = numbers(ends[-1], m.width, seed=0), numbers(ends[-1], m.width, seed=1)
    together = run(m, sizes, h, g, values, own)
    for k in range(6):
        part, one = slice(ends[k], ends[k + 1]), slice(k, k + 1)
        alone = run(m, [sizes[k]], h[part], g[part], values[one], own[one])
        assert torch.equal(alone[0], together[0][part]), k
        assert torch.equal(alone[1], together[1][part]), k
        assert torch.equal(alone[2], together[2][one]), k
