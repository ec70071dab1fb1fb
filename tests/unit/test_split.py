"""The cut: three parts that are the model, bit for bit (promise 1)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from fellray.platform.encoder import MINILM, Backbone, load_backbone, locate
from fellray.platform.errors import FellrayError
from fellray.platform.model_config import LoraSpec, ModelConfig
from fellray.platform.split import PARTS, cut_model, plan_cut


def inputs(sizes: list[int], vocabulary: int, seed: int, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of padded rows."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    ids = torch.randint(5, vocabulary, mask.shape, generator=draw)
    return torch.where(mask, ids, pad), mask


@pytest.fixture(scope="module", params=["bert", "roberta", "minilm"])
def encoder(request: pytest.FixtureRequest, tiny_encoder: Path, tiny_roberta: Path) -> str:
    names = {"bert": str(tiny_encoder), "roberta": str(tiny_roberta), "minilm": MINILM}
    return names[request.param]


@pytest.fixture(scope="module")
def backbone(encoder: str) -> Backbone:
    return load_backbone(encoder)


@pytest.fixture(scope="module")
def theirs(encoder: str) -> Any:
    return AutoModel.from_pretrained(locate(encoder), add_pooling_layer=False).eval()


@pytest.mark.parametrize(
    ("cut", "top", "threads"),
    [(1, 1, 1), (1, 1, 2), (0, 0, 1), (0, 1, 1), (2, 0, 1), (1, 3, 1), (4, 0, 1)],
)
def test_three_parts_are_the_model(
    backbone: Backbone, theirs: Any, cut: int, top: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    parts = cut_model(backbone, ModelConfig(cut=cut, top=top))
    assert [len(parts.cut.blocks[p]) for p in PARTS] == [cut, backbone.num_blocks - cut - top, top]
    for seed, sizes in enumerate([[16, 9, 3], [32], [16, 16, 16, 16], [48, 1, 33, 17, 48]]):
        ids, mask = inputs(sizes, 60, seed, pad=backbone.config["pad_token_id"])
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            h = parts.bottom(ids, mask, ())
            y = parts.trunk(h, mask, ())
            got = parts.top.blocks(y, mask, ())
            vectors = parts.top(y, mask, ())
        assert torch.equal(got, expected)
        for row, size in enumerate(sizes):
            mean = expected[row, :size].double().mean(0)
            torch.testing.assert_close(vectors[row].double(), mean / mean.norm(), rtol=0, atol=2e-7)


def test_the_parts_are_frozen_and_dropout_is_off(backbone: Backbone) -> None:
    parts = cut_model(backbone, ModelConfig())
    ids, mask = inputs([16, 5], 60, 0, pad=backbone.config["pad_token_id"])
    for module in (parts.bottom, parts.trunk, parts.top):
        assert not any(p.requires_grad for p in module.parameters())
        # our own wrappers have no mode; what the library's modules do depends on theirs
        theirs = [m for m in module.modules() if type(m).__module__.startswith("transformers.")]
        drops = [m for m in module.modules() if isinstance(m, torch.nn.Dropout)]
        assert theirs
        assert drops
        assert not any(m.training for m in theirs + drops)
    h = parts.bottom(ids, mask, ())
    assert torch.equal(h, parts.bottom(ids, mask, ()))


def test_either_side_alone_is_enough_for_its_parts(backbone: Backbone, theirs: Any) -> None:
    """What a client is sent builds bottom and top, what the server is sent builds the trunk."""
    config = ModelConfig()
    cut = plan_cut(backbone, config)
    client = backbone.select(cut.prefixes("bottom") + cut.prefixes("top"))
    server = backbone.select(cut.prefixes("trunk"))
    assert not client.arrays.keys() & server.arrays.keys()
    assert client.arrays.keys() | server.arrays.keys() == backbone.arrays.keys()
    assert not any(name.startswith("embeddings") for name in server.arrays)
    ours, far = cut_model(client, config), cut_model(server, config)
    ids, mask = inputs([16, 5], 60, 0, pad=backbone.config["pad_token_id"])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        h = far.trunk(ours.bottom(ids, mask, ()), mask, ())
        assert torch.equal(ours.top.blocks(h, mask, ()), expected)
    assert {p.device.type for p in ours.trunk.parameters()} == {"meta"}, "no memory for the others'"
    assert {p.device.type for p in far.bottom.parameters()} == {"meta"}


def test_block_1_is_not_mistaken_for_block_10(backbone: Backbone) -> None:
    cut = plan_cut(backbone, ModelConfig(cut=2, top=0))
    assert all(name.endswith(".") for part in PARTS for name in cut.prefixes(part))


def test_sites_are_named_as_in_the_whole_model(tiny_encoder: Path) -> None:
    backbone = load_backbone(str(tiny_encoder))
    lora = LoraSpec(r=2, target_modules=("output.dense", "query", "intermediate.dense"))
    cut = plan_cut(backbone, ModelConfig(cut=1, top=2, lora=lora))
    assert [s.path for s in cut.sites["bottom"]] == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.0.output.dense",
    ]
    assert [s.num_parameters(2) for s in cut.sites["bottom"]] == [2 * 64, 2 * 96, 2 * 96]
    assert {s.path.split(".")[2] for s in cut.sites["trunk"]} == {"1", "2"}
    assert {s.path.split(".")[2] for s in cut.sites["top"]} == {"3", "4"}
    for part in PARTS:
        for site in cut.sites[part]:
            weight = backbone.arrays[f"{site.path}.weight"]
            assert weight.shape == (site.d_out, site.d_in)


def test_adapters_meet_the_sites_they_were_planned_for(tiny_encoder: Path) -> None:
    """Order of `Blocks.adapted` and of the planned sites is one order."""
    backbone = load_backbone(str(tiny_encoder))
    every = (
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    config = ModelConfig(lora=LoraSpec(target_modules=every))
    parts = cut_model(backbone, config)
    for part, blocks in (("trunk", parts.trunk), ("top", parts.top.blocks)):
        for site, module in zip(parts.cut.sites[part], blocks.adapted, strict=True):
            wanted = torch.from_numpy(backbone.arrays[f"{site.path}.weight"])
            assert torch.equal(module.base.weight, wanted), site.path


def test_a_cut_that_leaves_no_trunk_is_refused(tiny_encoder: Path) -> None:
    backbone = load_backbone(str(tiny_encoder))
    with pytest.raises(FellrayError, match="choose cut \\+ top <= 4"):
        plan_cut(backbone, ModelConfig(cut=3, top=2))
    assert len(plan_cut(backbone, ModelConfig(cut=2, top=2)).blocks["trunk"]) == 1


def test_an_unknown_projection_is_refused(tiny_encoder: Path) -> None:
    backbone = load_backbone(str(tiny_encoder))
    lora = LoraSpec(target_modules=("q_proj",))
    with pytest.raises(FellrayError, match=r"'q_proj' is no projection .* known: query, key"):
        plan_cut(backbone, ModelConfig(lora=lora))


def test_no_adapters_stay_behind(tiny_encoder: Path) -> None:
    """One call's adapters are forgotten: the next call's client never meets them."""
    backbone = load_backbone(str(tiny_encoder))
    parts = cut_model(backbone, ModelConfig(lora=LoraSpec(r=2)))
    ids, mask = inputs([16], 60, 0, pad=0)
    h = parts.bottom(ids, mask, ())
    clean = parts.trunk(h, mask, ())
    pairs = [(torch.ones(1, 2, 32), torch.ones(1, 32, 2)) for _ in parts.trunk.adapted]
    assert not torch.equal(parts.trunk(h, mask, [pairs]), clean)
    assert torch.equal(parts.trunk(h, mask, ()), clean)
