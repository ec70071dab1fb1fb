"""Attention on lanes: each row's own, and autograd's gradients.

Shapes: M tokens of all lanes, L real tokens, n rows of one padded length T, e width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fellray.platform.attention import attend, unattend
from fellray.platform.lanes import Heap, Lanes

HEAD = 4
LENGTHS, LANE = [3, 20, 17, 1], [0, 0, 1, 2]


def mix(heap: Heap, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Four heads of queries, two of keys and values."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=heap.mask_nT[:, None, None])


def test_rows_one_by_one_and_autograd() -> None:
    rng = torch.Generator().manual_seed(0)
    lanes = Lanes(torch.tensor(LENGTHS), torch.tensor(LANE), 16, torch.full((3,), 4))
    widths = (4 * HEAD, 2 * HEAD, 2 * HEAD)
    leaves = [torch.randn(sum(LENGTHS), w, generator=rng, requires_grad=True) for w in widths]
    gradient_Ld = torch.randn(sum(LENGTHS), widths[0], generator=rng)

    rows = []
    for parts in zip(*(leaf.split(LENGTHS) for leaf in leaves), strict=True):
        q, k, v = (part.unflatten(1, (-1, HEAD)).transpose(0, 1) for part in parts)
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        rows.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    wanted_Ld = torch.cat(rows)
    wanted_Ld.backward(gradient_Ld)

    q, k, v = (lanes.spread(leaf.detach()) for leaf in leaves)
    mixed_Md = attend((q, k, v), lanes, HEAD, mix)
    torch.testing.assert_close(lanes.collect(mixed_Md), wanted_Ld.detach())
    seen: list[Tensor] = []

    def pull(again_Md: Tensor) -> Tensor:
        seen.append(again_Md)
        return lanes.spread(gradient_Ld)

    found = unattend((q, k, v), lanes, HEAD, mix, pull)
    assert torch.equal(seen[0], mixed_Md)
    for got_Md, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(lanes.collect(got_Md), leaf.grad)
