"""Transformer blocks on lanes: one product of the base for all clients' tokens, no autograd inside.

The modules and weights are transformers' own (BERT's family); only their forward is written out,
and its backward beside it, so that what a backward needs is a few flat tensors that can be kept,
cut by lanes, or made again. Nothing here knows clients, engines or messages.

Lanes may enter at different blocks: a block works on the first so many tokens, those that are in,
and the others' wait behind them; so they do on the way back.

Shapes: M tokens of all lanes, d width, f width inside the feed-forward part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fellray.platform.adapters import LoraLinear
from fellray.platform.attention import Parts, attend, unattend
from fellray.platform.kernel import Loras, Piece, add_product, backpropagate
from fellray.platform.lanes import Heap, Lanes
from fellray.platform.split import Blocks


@dataclass(frozen=True)
class Batch:
    """Lanes and every set of adapters that they use; sets are added up."""

    lanes: Lanes
    sets: Sequence[Loras]

    def pieces(self, site: int | None) -> list[Piece]:
        """All adapters of one site; none where a projection has none."""
        return [] if site is None else [p for loras in self.sets for p in loras.sites[site]]


@dataclass(frozen=True)
class Saved:
    """What one block's backward needs, token by token."""

    x_Md: Tensor
    q_Md: Tensor
    k_Md: Tensor
    v_Md: Tensor
    middle_Md: Tensor
    """Before the first normalisation."""
    wide_Mf: Tensor
    """Before the activation function."""
    end_Md: Tensor
    """Before the second normalisation; in a decoder's block, what the gate is multiplied by [M, f].
    """

    @property
    def qkv(self) -> Parts:
        """What attention mixes."""
        return self.q_Md, self.k_Md, self.v_Md


class Projection:
    """A frozen linear layer, adapted or not."""

    def __init__(self, module: nn.Module, site: int | None):
        base = module.base if isinstance(module, LoraLinear) else module
        assert isinstance(base, nn.Linear)
        self._base = base
        self._site = site
        self.adapted = site is not None

    @property
    def weight(self) -> Tensor:
        """The base's [o, i]."""
        return self._base.weight

    def forward(self, x_Mi: Tensor, batch: Batch) -> Tensor:
        """base(x) and the adapters' part [M, o]."""
        bias = self._base.bias
        y = x_Mi @ self.weight.T if bias is None else torch.addmm(bias, x_Mi, self.weight.T)
        add_product(y, x_Mi, batch.pieces(self._site))
        return y

    def backward(
        self, dy_Mo: Tensor, x_Mi: Tensor | None, batch: Batch, onto_Mi: Tensor | None = None
    ) -> Tensor:
        """The input's gradient [M, i], added onto another where one is given; an adapted projection
        must be given its input x."""
        dx = dy_Mo @ self.weight if onto_Mi is None else onto_Mi.addmm_(dy_Mo, self.weight)
        if pieces := batch.pieces(self._site):
            assert x_Mi is not None
            backpropagate(dx, dy_Mo, x_Mi, pieces)
        return dx


class Block(Protocol):
    """One block on lanes."""

    @property
    def dim(self) -> int:
        """The width d."""
        ...

    def forward(self, x_Md: Tensor, batch: Batch) -> tuple[Tensor, Saved]:
        """Hidden states after the block [M, d]."""
        ...

    def backward(self, dy_Md: Tensor, saved: Saved, batch: Batch) -> Tensor:
        """The gradient at the block's input [M, d]; adapters' gradients go to their rows."""
        ...

    def skip(self, h_Md: Tensor) -> Saved:
        """What is left where no lane is in."""
        ...

    def bytes_per_token(self) -> int:
        """Of `Saved`."""
        ...


class PackedBlock:
    """One block; `layer` is a BertLayer or one of its relatives."""

    def __init__(self, layer: Any, adapted: Sequence[LoraLinear]):
        """Args: adapted: the adapted projections of the whole run of blocks, in order of sites."""
        place = {id(module): at for at, module in enumerate(adapted)}

        def projection(module: nn.Module) -> Projection:
            return Projection(module, place.get(id(module)))

        own = layer.attention.self
        self._qkv = [projection(module) for module in (own.query, own.key, own.value)]
        self._head = int(own.attention_head_size)
        self._out = projection(layer.attention.output.dense)
        self._norm1: nn.LayerNorm = layer.attention.output.LayerNorm
        self._up = projection(layer.intermediate.dense)
        self._activate = layer.intermediate.intermediate_act_fn
        self._down = projection(layer.output.dense)
        self._norm2: nn.LayerNorm = layer.output.LayerNorm

    def forward(self, x_Md: Tensor, batch: Batch) -> tuple[Tensor, Saved]:
        """Hidden states after the block [M, d]."""
        q, k, v = (projection.forward(x_Md, batch) for projection in self._qkv)
        mixed = attend((q, k, v), batch.lanes, self._head, _mix)
        middle = self._out.forward(mixed, batch).add_(x_Md)
        h = _normalise(self._norm1, middle)
        wide = self._up.forward(h, batch)
        end = self._down.forward(self._activate(wide), batch).add_(h)
        return _normalise(self._norm2, end), Saved(x_Md, q, k, v, middle, wide, end)

    def backward(self, dy_Md: Tensor, saved: Saved, batch: Batch) -> Tensor:
        """The gradient at the block's input [M, d]; adapters' gradients go to their rows."""
        dend = _denormalise(self._norm2, saved.end_Md, dy_Md)
        active = self._activate(saved.wide_Mf) if self._down.adapted else None
        dwide = self._inactivate(saved.wide_Mf, self._down.backward(dend, active, batch))
        h = _normalise(self._norm1, saved.middle_Md)
        dh = self._up.backward(dwide, h, batch, onto_Mi=dend)
        dmiddle = _denormalise(self._norm1, saved.middle_Md, dh)
        pulled = unattend(
            saved.qkv,
            batch.lanes,
            self._head,
            _mix,
            lambda mixed_Md: self._out.backward(dmiddle, mixed_Md, batch),
        )
        for projection, gradient in zip(self._qkv, pulled, strict=True):
            dmiddle = projection.backward(gradient, saved.x_Md, batch, onto_Mi=dmiddle)
        return dmiddle

    def skip(self, h_Md: Tensor) -> Saved:
        """What is left where no lane is in."""
        none_Md = h_Md[:0]
        wide = none_Md.new_empty(0, len(self._up.weight))
        return Saved(none_Md, none_Md, none_Md, none_Md, none_Md, wide, none_Md)

    @property
    def dim(self) -> int:
        """The width d."""
        return self._up.weight.shape[1]

    def bytes_per_token(self) -> int:
        """Of `Saved`."""
        weight = self._up.weight
        wide, d = weight.shape
        return (6 * d + wide) * weight.itemsize

    def _inactivate(self, wide_Mf: Tensor, dactive_Mf: Tensor) -> Tensor:
        if getattr(self._activate, "act", None) is F.gelu:  # without going forward once more
            exact: Tensor = torch.ops.aten.gelu_backward(dactive_Mf, wide_Mf)
            return exact
        with torch.enable_grad():
            leaf = wide_Mf.detach().requires_grad_()
            (dwide,) = torch.autograd.grad(self._activate(leaf), leaf, dactive_Mf)
        return dwide


class PackedBlocks:
    """A run of blocks on lanes."""

    def __init__(
        self,
        blocks: Blocks,
        make: Callable[[Any, Sequence[LoraLinear]], Block] = PackedBlock,
    ):
        """Args: make: one block on lanes, of a family's module."""
        self._blocks = [make(layer, blocks.adapted) for layer in blocks.blocks]
        self._first = blocks.first

    @property
    def dim(self) -> int:
        """The width d."""
        return self._blocks[0].dim

    def measure(self, num_tokens: int) -> int:
        """Bytes that a forward pass leaves for its backward, at most."""
        return num_tokens * sum(block.bytes_per_token() for block in self._blocks)

    @torch.no_grad()
    def forward(self, h_Md: Tensor, batch: Batch, keep: bool) -> tuple[Tensor, list[Saved]]:
        """Hidden states after the blocks [M, d], and what `backward` needs of each, or nothing."""
        kept = []
        for place, block in enumerate(self._blocks, self._first):
            own = replace(batch, lanes=batch.lanes.entered(place))
            size = own.lanes.num_tokens
            if not size:
                saved = block.skip(h_Md)
            else:
                y_Md, saved = block.forward(h_Md[:size], own)
                h_Md = _before(y_Md, h_Md)
            if keep:
                kept.append(saved)
        return h_Md, kept

    @torch.no_grad()
    def backward(self, g_Md: Tensor, kept: Sequence[Saved], batch: Batch) -> Tensor:
        """The gradient at each lane's entry [M, d]."""
        places = range(self._first, self._first + len(self._blocks))
        for place, block, saved in zip(
            reversed(places), reversed(self._blocks), reversed(kept), strict=True
        ):
            own = replace(batch, lanes=batch.lanes.entered(place))
            if size := own.lanes.num_tokens:
                g_Md = _before(block.backward(g_Md[:size], saved, own), g_Md)
        return g_Md


def _before(first_Md: Tensor, all_Md: Tensor) -> Tensor:
    """All tokens, the first ones replaced."""
    size = len(first_Md)
    return first_Md if size == len(all_Md) else torch.cat([first_Md, all_Md[size:]])


def _mix(heap: Heap, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within each row."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=heap.mask_nT[:, None, None])


def _normalise(norm: nn.LayerNorm, x_Md: Tensor) -> Tensor:
    return F.layer_norm(x_Md, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _denormalise(norm: nn.LayerNorm, x_Md: Tensor, dy_Md: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x_Md.detach().requires_grad_()
        (dx,) = torch.autograd.grad(_normalise(norm, leaf), leaf, dy_Md)
    return dx
