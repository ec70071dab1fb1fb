"""The cut: one encoder as bottom, trunk and top.

bottom = embeddings and blocks 0..k-1, trunk = blocks k..n-1-top, top = the last blocks and the
pooling. Put together they are the model, bit for bit. Where clients have cuts k of their own, the
bottom has the blocks of the largest, of which each row passes its own, and the trunk those from the
smallest on, which a row enters at its own. Nothing here knows where a part runs.

Shapes: n rows of one padded length T, d width. Masks are True at real tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fellray.platform.adapters import LoraLinear, Pair, Site
from fellray.platform.config import ModelConfig
from fellray.platform.encoder import Backbone, build
from fellray.platform.errors import FellrayError

PARTS = ("bottom", "trunk", "top")
SIDES = ("bottom", "top")
"""What a client holds. The order of its adapters' parameters is this one."""


@dataclass(frozen=True)
class Cut:
    """Which blocks belong to which part, and the projections adapted in each.

    Where cuts differ, blocks between the smallest and the largest belong to bottom and trunk.
    """

    blocks: dict[str, range]
    sites: dict[str, list[Site]]

    @property
    def outer(self) -> list[Site]:
        """The sites of a client's side."""
        return [site for side in SIDES for site in self.sites[side]]

    def prefixes(self, part: str) -> list[str]:
        """Names of the backbone's arrays that a part needs begin with one of these."""
        embeddings = ["embeddings."] if part == "bottom" else []
        return embeddings + [f"encoder.layer.{i}." for i in self.blocks[part]]


class Blocks(nn.Module):
    """A run of transformer blocks whose adapters are given with every call."""

    def __init__(self, blocks: Sequence[nn.Module], first: int = 0):
        """Args: first: the first one's place in the model."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.first = first
        self.adapted = [m for block in blocks for m in block.modules() if isinstance(m, LoraLinear)]

    def forward(
        self,
        h_nTd: Tensor,
        mask_nT: Tensor,
        adapters: Sequence[Sequence[Pair]],
        count: int | None = None,
    ) -> Tensor:
        """Hidden states [n, T, d] after the first `count` blocks, or all; `adapters` holds sets of
        one pair per site, added up."""
        for i, module in enumerate(self.adapted):
            module.pairs = tuple(pairs[i] for pairs in adapters)
        mask = mask_nT[:, None, None, :]
        for block in self.blocks[:count]:
            h_nTd = block(h_nTd, mask)
        for module in self.adapted:
            module.pairs = ()
        return h_nTd


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
        h: Tensor = self.blocks(self.embeddings(input_ids=ids_nT), mask_nT, adapters, cut)
        return h


class Top(nn.Module):
    """The last blocks and the pooling: the only part that sees labels."""

    def __init__(self, blocks: Blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, h_nTd: Tensor, mask_nT: Tensor, adapters: Sequence[Sequence[Pair]]) -> Tensor:
        """Unit vectors [n, d]: the mean over real tokens, normalised."""
        h = self.blocks(h_nTd, mask_nT, adapters)
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
        FellrayError: k or top leaves no block to the trunk; a target is not in the model.
    """
    n, top = backbone.num_blocks, model.top
    least, k = model.span
    if k + top >= n:
        raise FellrayError(
            f"model.cut={k} and model.top={top}: {backbone.name} has {n} blocks and the trunk "
            f"needs at least one; choose cut + top <= {n - 1}"
        )
    blocks = {"bottom": range(k), "trunk": range(least, n - top), "top": range(n - top, n)}
    d, wide = backbone.dim, int(backbone.config["intermediate_size"])
    known = {
        "query": ("attention.self.query", d, d),
        "key": ("attention.self.key", d, d),
        "value": ("attention.self.value", d, d),
        "attention.output.dense": ("attention.output.dense", d, d),
        "intermediate.dense": ("intermediate.dense", d, wide),
        "output.dense": ("output.dense", wide, d),
    }
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
            Site(f"encoder.layer.{i}.{path}", di, do, own[part](i) if least <= i < k else None)
            for i in span
            for path, di, do in chosen
        ]
        for part, span in blocks.items()
    }
    if model.freeze_bottom:
        sites["bottom"] = []
    return Cut(blocks, sites)


def cut_model(backbone: Backbone, model: ModelConfig) -> Parts:
    """Build the parts; those whose arrays the backbone lacks stay without memory."""
    cut = plan_cut(backbone, model)
    whole = build(backbone)
    for part in PARTS:
        for site in cut.sites[part]:
            parent, _, leaf = site.path.rpartition(".")
            owner = whole.get_submodule(parent)
            base = getattr(owner, leaf)
            if isinstance(base, LoraLinear):  # of bottom and trunk
                continue
            assert isinstance(base, nn.Linear)
            setattr(owner, leaf, LoraLinear(base, model.lora.scaling))
    layers = whole.get_submodule("encoder.layer")
    assert isinstance(layers, nn.ModuleList)
    run = {part: Blocks([layers[i] for i in span], span.start) for part, span in cut.blocks.items()}
    least, most = model.span
    bottom = Bottom(whole.get_submodule("embeddings"), run["bottom"], least < most)
    return Parts(cut, bottom, run["trunk"], Top(run["top"]))
