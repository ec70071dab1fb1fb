"""The cut: one model as bottom, trunk and top.

bottom = embeddings and blocks 0..k-1, trunk = blocks k..n-1-top, top = the last blocks and the
pooling, or a decoder's last normalisation and head. Put together they are the model, bit for bit.
Where clients have cuts k of their own, the bottom has the blocks of the largest, of which each row
passes its own, and the trunk those from the smallest on, which a row enters at its own. Nothing
here knows where a part runs.

Shapes: n rows of one padded length T, d width, C tokens that a cache has room for. Masks are True
at real tokens; rows are padded at their end, so a causal block needs none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fellray.platform.adapters import LoraLinear, Pair, Site
from fellray.platform.caches import Sight
from fellray.platform.decoder import Head, check_decoder, find_projections
from fellray.platform.encoder import Backbone, build
from fellray.platform.errors import FellrayError
from fellray.platform.levels import GATE, GatedLinear, spread_levels
from fellray.platform.model_config import ModelConfig

PARTS = ("bottom", "trunk", "top")
SIDES = ("bottom", "top")
"""What a client holds. The order of its adapters' parameters is this one."""


@dataclass(frozen=True)
class Layout:
    """Under which names a kind of model keeps its arrays."""

    blocks: str
    bottom: tuple[str, ...]
    top: tuple[str, ...] = ()
    everywhere: tuple[str, ...] = ()


ENCODER = Layout("encoder.layer", ("embeddings.",))
DECODER = Layout(
    "model.layers", ("model.embed_tokens.",), ("model.norm.", "lm_head."), ("model.rotary_emb.",)
)


@dataclass(frozen=True)
class Cut:
    """Which blocks belong to which part, and the projections adapted in each.

    Where cuts differ, blocks between the smallest and the largest belong to bottom and trunk.
    """

    blocks: dict[str, range]
    sites: dict[str, list[Site]]
    layout: Layout = ENCODER

    @property
    def outer(self) -> list[Site]:
        """The sites of a client's side."""
        return [site for side in SIDES for site in self.sites[side]]

    def prefixes(self, part: str) -> list[str]:
        """Names of the backbone's arrays that a part needs begin with one of these."""
        layout = self.layout
        ends = {"bottom": layout.bottom, "trunk": (), "top": layout.top}[part]
        blocks = [f"{layout.blocks}.{i}." for i in self.blocks[part]]
        return [*ends, *layout.everywhere, *blocks]


class Blocks(nn.Module):
    """A run of transformer blocks whose adapters are given with every call."""

    def __init__(
        self, blocks: Sequence[nn.Module], first: int = 0, rotary: nn.Module | None = None
    ):
        """Args: first: the first one's place in the model. rotary: a decoder's positions: each
        token then sees those before it only."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.first = first
        self._rotary = (rotary,)  # hidden from `to`: angles stay fp32 in blocks of any precision
        self.adapted = [m for block in blocks for m in block.modules() if isinstance(m, LoraLinear)]
        self.sets = 1
        """How many adapters each adapted projection has."""

    def forward(
        self,
        h_nTd: Tensor,
        mask_nT: Tensor,
        adapters: Sequence[Sequence[Pair]],
        count: int | None = None,
    ) -> Tensor:
        """Hidden states [n, T, d] after the first `count` blocks, or all; `adapters` holds sets of
        one pair per site, added up."""
        self._adapt(adapters)
        if self.rotary:
            places = torch.arange(h_nTd.shape[1], device=h_nTd.device)[None]
            angles = self.rotary(h_nTd, places)
            for block in self.blocks[:count]:
                h_nTd = block(h_nTd, position_embeddings=angles)
        else:
            mask = mask_nT[:, None, None, :]
            for block in self.blocks[:count]:
                h_nTd = block(h_nTd, mask)
        self._adapt(())
        return h_nTd

    def extend(
        self, h_nTd: Tensor, sight: Sight, adapters: Sequence[Sequence[Pair]], count: int | None
    ) -> Tensor:
        """The same for tokens that follow others, whose keys and values a cache holds."""
        assert self.rotary, "an encoder has no order"
        self._adapt(adapters)
        angles = self.rotary(h_nTd, sight.stretch.position_nT)
        mask = sight.stretch.sees_nTC[:, None]
        for block in self.blocks[:count]:
            h_nTd = block(
                h_nTd, attention_mask=mask, position_embeddings=angles, past_key_values=sight
            )
        self._adapt(())
        return h_nTd

    @property
    def rotary(self) -> nn.Module | None:
        """A decoder's positions."""
        return self._rotary[0]

    def _adapt(self, adapters: Sequence[Sequence[Pair]]) -> None:
        for i, module in enumerate(self.adapted):
            module.pairs = tuple(pairs[i] for pairs in adapters)


class Bottom(nn.Module):
    """Embeddings and the first blocks: the only part that sees token ids."""

    def __init__(self, embeddings: nn.Module, blocks: Blocks, cuts_differ: bool = False):
        """Args: cuts_differ: see `Cut`."""
        super().__init__()
        self.embeddings = embeddings
        self.blocks = blocks
        self.cuts_differ = cuts_differ

    def forward(
        self,
        ids_nT: Tensor,
        mask_nT: Tensor,
        adapters: Sequence[Sequence[Pair]],
        cut: int | None = None,
    ) -> Tensor:
        """Hidden states at the lower cut [n, T, d]; the largest where none is given."""
        h: Tensor = self.blocks(self.embeddings(ids_nT), mask_nT, adapters, cut)
        return h


class Top(nn.Module):
    """The last blocks and the pooling or the head: the only part that sees labels."""

    def __init__(self, blocks: Blocks, head: Head | None = None):
        """Args: head: a decoder's."""
        super().__init__()
        self.blocks = blocks
        self.head = head

    def forward(self, h_nTd: Tensor, mask_nT: Tensor, adapters: Sequence[Sequence[Pair]]) -> Tensor:
        """Unit vectors [n, d]: the mean over real tokens, normalised. Of a decoder the last
        hidden states [n, T, d], as its head takes them."""
        h: Tensor = self.blocks(h_nTd, mask_nT, adapters)
        if self.head:
            states: Tensor = self.head.norm(h)
            return states
        return F.normalize(mean_tokens(h, mask_nT), dim=1)


def mean_tokens(h_nTd: Tensor, mask_nT: Tensor) -> Tensor:
    """Means over real tokens [n, d]."""
    weight = mask_nT[:, :, None].to(h_nTd.dtype)
    return (h_nTd * weight).sum(1) / weight.sum(1)


@dataclass(frozen=True)
class Parts:
    """A model cut in three."""

    cut: Cut
    bottom: Bottom
    trunk: Blocks
    top: Top


def plan_cut(backbone: Backbone, model: ModelConfig) -> Cut:
    """Where the cut falls and what is adapted, without building anything but shapes.

    Raises:
        FellrayError: k or top leaves no block to the trunk; a target is not in the model; or as
            `check_decoder`.
    """
    n, top = backbone.num_blocks, model.top
    least, k = model.span
    if k + top >= n:
        raise FellrayError(
            f"model.cut={k} and model.top={top}: {backbone.name} has {n} blocks and the trunk "
            f"needs at least one; choose cut + top <= {n - 1}"
        )
    blocks = {"bottom": range(k), "trunk": range(least, n - top), "top": range(n - top, n)}
    layout = ENCODER
    d, wide = backbone.dim, int(backbone.config["intermediate_size"])
    known = {
        "query": ("attention.self.query", d, d),
        "key": ("attention.self.key", d, d),
        "value": ("attention.self.value", d, d),
        "attention.output.dense": ("attention.output.dense", d, d),
        "intermediate.dense": ("intermediate.dense", d, wide),
        "output.dense": ("output.dense", wide, d),
    }
    if backbone.generative:
        check_decoder(backbone)
        layout, known = DECODER, find_projections(backbone)
    for target in model.lora.target_modules:
        if target not in known:
            raise FellrayError(
                f"model.lora.target_modules: {target!r} is no projection of {backbone.name}; "
                f"known: {', '.join(known)}"
            )
    chosen = [known[t] for t in known if t in model.lora.target_modules]
    # a client of cut c holds the blocks below c, the server the others
    own = {"bottom": lambda i: range(i + 1, k + 1), "trunk": lambda i: range(least, i + 1)}
    sites = {
        part: [
            Site(f"{layout.blocks}.{i}.{path}", di, do, own[part](i) if least <= i < k else None)
            for i in span
            for path, di, do in chosen
        ]
        for part, span in blocks.items()
    }
    if model.freeze_bottom:
        sites["bottom"] = []
    if model.levels:
        sites = {part: spread_levels(own, part, model.levels) for part, own in sites.items()}
    return Cut(blocks, sites, layout)


def cut_model(backbone: Backbone, model: ModelConfig) -> Parts:
    """Build the parts; those whose arrays the backbone lacks stay without memory."""
    cut = plan_cut(backbone, model)
    whole = build(backbone)
    for part in PARTS:
        gated = {site.path for site in cut.sites[part] if site.level == GATE}
        for site in cut.sites[part]:
            parent, _, leaf = site.path.rpartition(".")
            owner = whole.get_submodule(parent)
            base = getattr(owner, leaf)
            if isinstance(base, LoraLinear):  # of bottom and trunk, or of another level
                continue
            assert isinstance(base, nn.Linear)
            kind = GatedLinear if site.path in gated else LoraLinear
            setattr(owner, leaf, kind(base, model.lora.scaling))
    layers = whole.get_submodule(cut.layout.blocks)
    assert isinstance(layers, nn.ModuleList)
    rotary = whole.get_submodule("model.rotary_emb") if backbone.generative else None
    run = {
        part: Blocks([layers[i] for i in span], span.start, rotary)
        for part, span in cut.blocks.items()
    }
    for part, blocks in run.items():
        if blocks.adapted:
            blocks.sets = len(cut.sites[part]) // len(blocks.adapted)
    least, most = model.span
    embeddings = whole.get_submodule(cut.layout.bottom[0].rstrip("."))
    bottom = Bottom(embeddings, run["bottom"], least < most)
    head = None
    if backbone.generative:
        head = Head(whole.get_submodule("model.norm"), whole.get_submodule("lm_head"))
    return Parts(cut, bottom, run["trunk"], Top(run["top"], head))
