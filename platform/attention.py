"""Attention on lanes and its backward: rows are padded one by one and mixed a heap at a time.

What a row sees is its block's own affair, and so are projections. It knows nothing of adapters,
clients or messages.

Shapes: M tokens of all lanes, X tokens of rows padded one by one, n rows of one padded length T,
d width, h heads, e width of a head. Keys and values may have fewer heads than queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fellray.platform.lanes import Heap, Lanes

Mix = Callable[[Heap, Tensor, Tensor, Tensor], Tensor]
"""What a heap's queries, keys and values [n, h, T, e] come to; keeps the shape of the queries."""
Parts = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values [M, d], each of its own width."""


def attend(parts: Parts, lanes: Lanes, head: int, mix: Mix) -> Tensor:
    """Every row's mixed values [M, d]; `head` is the width e."""
    padded = [lanes.pad(part) for part in parts]
    mixed_Xd = torch.empty_like(padded[0])
    for heap in lanes.heaps:
        _split(heap, mixed_Xd, head).copy_(mix(heap, *(_split(heap, p, head) for p in padded)))
    return lanes.unpad(mixed_Xd)


def unattend(
    parts: Parts, lanes: Lanes, head: int, mix: Mix, pull: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """The gradients at queries, keys and values.

    Args:
        pull: given what `attend` answered, which is made again here, the gradient at it.
    """
    padded = [lanes.pad(part) for part in parts]
    mixed_Xd = torch.empty_like(padded[0])
    graphs = []
    for heap in lanes.heaps:
        leaves = [_split(heap, part, head).detach().requires_grad_() for part in padded]
        with torch.enable_grad():
            mixed = mix(heap, *leaves)
        _split(heap, mixed_Xd, head).copy_(mixed.detach())
        graphs.append((mixed, leaves))
    dmixed_Xd = lanes.pad(pull(lanes.unpad(mixed_Xd)))
    found = [torch.empty_like(part) for part in padded]
    for heap, (mixed, leaves) in zip(lanes.heaps, graphs, strict=True):
        gradients = torch.autograd.grad(mixed, leaves, _split(heap, dmixed_Xd, head))
        for part, gradient in zip(found, gradients, strict=True):
            _split(heap, part, head).copy_(gradient)
    return [lanes.unpad(part) for part in found]


def _split(heap: Heap, x_Xd: Tensor, head: int) -> Tensor:
    """A heap's rows by head [n, h, T, e], a view."""
    n, length = heap.mask_nT.shape
    return heap.cut(x_Xd).view(n, length, -1, head).transpose(1, 2)
