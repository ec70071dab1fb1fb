"""A decoder's block on lanes: what `packed` does for BERT's family, for Llama's and Qwen's.

The modules and weights are transformers' own; forward and backward are written out for the same
reasons as there. Rows are padded at their end and a token sees none behind it, so attention needs
no mask; where a text goes on, it sees what a cache holds. It knows nothing of clients or messages.

Shapes: M tokens of all lanes, L real tokens, n rows of one padded length T, d width, f width inside
the feed-forward part, h heads, e width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fellray.platform.adapters import LoraLinear
from fellray.platform.attention import attend, unattend
from fellray.platform.caches import Cache, Sight, Stretches
from fellray.platform.lanes import Heap
from fellray.platform.packed import Batch, PackedBlocks, Projection, Saved
from fellray.platform.split import Blocks


@dataclass(frozen=True)
class Look:
    """One message's rows, and what is held of them."""

    rows: Stretches
    cache: Cache


class CausalBlock:
    """One block; `layer` is a LlamaDecoderLayer or one of its relatives."""

    def __init__(self, layer: Any, adapted: Sequence[LoraLinear], rotary: nn.Module):
        """Args: adapted: the adapted projections of the whole run of blocks, in order of sites.
        rotary: positions to angles."""
        place = {id(module): at for at, module in enumerate(adapted)}

        def projection(module: nn.Module) -> Projection:
            return Projection(module, place.get(id(module)))

        own = layer.self_attn
        self._qkv = [projection(module) for module in (own.q_proj, own.k_proj, own.v_proj)]
        self._out = projection(own.o_proj)
        self._head = int(own.head_dim)
        self._scaling = float(own.scaling)
        self._place = int(own.layer_idx)
        self._rotary = rotary
        self._q_norm: nn.Module | None = getattr(own, "q_norm", None)
        self._k_norm: nn.Module | None = getattr(own, "k_norm", None)
        self._norm1: nn.Module = layer.input_layernorm
        self._norm2: nn.Module = layer.post_attention_layernorm
        self._gate, self._up, self._down = (
            projection(m) for m in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        )
        self._activate = layer.mlp.act_fn

    @property
    def dim(self) -> int:
        """The width d."""
        return len(self._out.weight)

    def forward(self, x_Md: Tensor, batch: Batch) -> tuple[Tensor, Saved]:
        """Hidden states after the block [M, d]."""
        q, k, v = self._look(x_Md, batch)
        mixed = attend((q, k, v), batch.lanes, self._head, self._attend)
        middle = self._out.forward(mixed, batch).add_(x_Md)
        y, gate, up = self._feed(middle, batch)
        return y, Saved(x_Md, q, k, v, middle, gate, up)

    def extend(self, x_Md: Tensor, batch: Batch, looks: Sequence[Look]) -> Tensor:
        """Hidden states after the block [M, d] of tokens that follow others: the rows of `looks`,
        one message behind the other. Their keys and values go to the caches."""
        q_L, k_L, v_L = (batch.lanes.collect(part) for part in self._look(x_Md, batch))
        sizes = [look.rows.num_tokens for look in looks]
        mixed = []
        for look, *parts in zip(looks, *(p.split(sizes) for p in (q_L, k_L, v_L)), strict=True):
            groups = [self._resume(look, parts, at) for at in range(len(look.rows.stretches))]
            mixed.append(look.rows.pack(groups))
        middle = self._out.forward(batch.lanes.spread(torch.cat(mixed)), batch).add_(x_Md)
        return self._feed(middle, batch)[0]

    def backward(self, dy_Md: Tensor, saved: Saved, batch: Batch) -> Tensor:
        """The gradient at the block's input [M, d]; adapters' gradients go to their rows."""
        gate, up = saved.wide_Mf, saved.end_Md
        active = self._activate(gate).mul_(up) if self._down.adapted else None
        dactive = self._down.backward(dy_Md, active, batch)
        dgate, dup = _pull(lambda g, u: self._activate(g) * u, (gate, up), dactive)
        h = self._norm2(saved.middle_Md)
        dh = self._up.backward(dup, h, batch, self._gate.backward(dgate, h, batch))
        dmiddle = dy_Md + _pull(self._norm2, (saved.middle_Md,), dh)[0]
        h = self._norm1(saved.x_Md)
        dh = torch.zeros_like(saved.x_Md)
        pulled = unattend(
            saved.qkv,
            batch.lanes,
            self._head,
            self._attend,
            lambda mixed_Md: self._out.backward(dmiddle, mixed_Md, batch),
        )
        for projection, gradient in zip(self._qkv, pulled, strict=True):
            dh = projection.backward(gradient, h, batch, dh)
        return dmiddle + _pull(self._norm1, (saved.x_Md,), dh)[0]

    def skip(self, h_Md: Tensor) -> Saved:
        """What is left where no lane is in."""
        none_Md = h_Md[:0]
        q, k, v = (none_Md.new_empty(0, len(p.weight)) for p in self._qkv)
        wide = none_Md.new_empty(0, len(self._up.weight))
        return Saved(none_Md, q, k, v, none_Md, wide, wide)

    def bytes_per_token(self) -> int:
        """Of `Saved`."""
        weight = self._up.weight
        wide, d = weight.shape
        return (2 * d + 2 * wide + sum(len(p.weight) for p in self._qkv)) * weight.itemsize

    def _look(self, x_Md: Tensor, batch: Batch) -> list[Tensor]:
        """Queries, keys and values, as projected."""
        h = self._norm1(x_Md)
        return [projection.forward(h, batch) for projection in self._qkv]

    def _feed(self, middle_Md: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The feed-forward part: the block's output, and both sides of its gate."""
        h = self._norm2(middle_Md)
        gate, up = self._gate.forward(h, batch), self._up.forward(h, batch)
        return self._down.forward(self._activate(gate) * up, batch).add_(middle_Md), gate, up

    def _resume(self, look: Look, parts: Sequence[Tensor], at: int) -> Tensor:
        """Attention of one group's new tokens to all before [n, T, h * e]."""
        stretch = look.rows.stretches[at]
        q, k, v = (
            look.rows.pad(part, stretch).unflatten(2, (-1, self._head)).transpose(1, 2)
            for part in parts
        )
        q, k = self._turn(q, k, stretch.position_nT)
        k, v = Sight(look.cache, stretch).update(k, v, self._place)
        mixed = self._mix(q, k, v, stretch.sees_nTC[:, None])
        return mixed.transpose(1, 2).flatten(2)

    def _attend(self, _: Heap, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within whole rows [n, h, T, e]."""
        q, k = self._turn(q, k, torch.arange(q.shape[2], device=q.device)[None])
        return self._mix(q, k, v, None)

    def _turn(self, q: Tensor, k: Tensor, position_nT: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, normalised where the family does, at their positions."""
        q = self._q_norm(q) if self._q_norm else q
        k = self._k_norm(k) if self._k_norm else k
        cos, sin = (angle[:, None] for angle in self._rotary(q, position_nT))
        return q * cos + _quarter(q) * sin, k * cos + _quarter(k) * sin

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention; several heads of queries share one of keys."""
        shared = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(shared, 1) if shared > 1 else part for part in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self._scaling
        )


class CausalBlocks(PackedBlocks):
    """A run of a decoder's blocks on lanes."""

    def __init__(self, blocks: Blocks):
        self._causal: list[CausalBlock] = []

        def make(layer: Any, adapted: Sequence[LoraLinear]) -> CausalBlock:
            assert blocks.rotary
            self._causal.append(CausalBlock(layer, adapted, blocks.rotary))
            return self._causal[-1]

        super().__init__(blocks, make)

    @torch.no_grad()
    def extend(self, h_Md: Tensor, batch: Batch, looks: Sequence[Look]) -> Tensor:
        """Hidden states after the blocks [M, d] of tokens that follow others, as of
        `CausalBlock.extend`; all lanes enter at the first block."""
        for block in self._causal:
            h_Md = block.extend(h_Md, batch, looks)
        return h_Md


def _quarter(x_nhTe: Tensor) -> Tensor:
    """Every pair of numbers turned by 90 degrees; a pair's two lie half a head apart."""
    first, second = x_nhTe.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _pull(function: Any, inputs: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Gradients at a function's inputs, given that at its output."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, gradient)
