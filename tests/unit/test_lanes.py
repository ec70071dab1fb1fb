"""Lanes: where tokens lie depends on a client's own rows, and every token is found again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fellray.platform.lanes import STEP, Lanes

clients = st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=6), min_size=1, max_size=6)


def lay(sizes: list[list[int]], ranks: list[int] | None = None, multiple: int = 16) -> Lanes:
    lane = [k for k, own in enumerate(sizes) for _ in own]
    flat = [length for own in sizes for length in own]
    return Lanes(
        torch.tensor(flat), torch.tensor(lane), multiple, torch.tensor(ranks or [8] * len(sizes))
    )


def tokens(lanes: Lanes, count: int, width: int = 2) -> torch.Tensor:
    return torch.arange(1.0, 1 + count * width).reshape(count, width)


def test_by_hand() -> None:
    lanes = lay([[3, 20], [5], [2, 2]])
    assert lanes.order_K.tolist() == [1, 2, 0], "the short lanes lie first"
    assert [(s.start, s.tokens, s.lanes) for s in lanes.stacks] == [
        (0, 16, slice(0, 2)),
        (32, 24, slice(2, 3)),
    ]
    assert lanes.spans() == [(0, 16), (16, 32), (32, 56)]
    flat = lanes.spread(tokens(lanes, 32, 1)).squeeze(1)
    assert flat[:6].tolist() == [24.0, 25.0, 26.0, 27.0, 28.0, 0.0]
    assert flat[16:21].tolist() == [29.0, 30.0, 31.0, 32.0, 0.0]
    assert flat[32:].tolist() == [*map(float, range(1, 24)), 0.0]
    short, long = lanes.heaps
    padded = lanes.pad(flat[:, None])
    assert short.cut(padded)[0, :, 0].tolist() == [1.0, 2.0, 3.0, *[0.0] * 13]
    assert long.cut(padded)[0, :, 0].tolist() == [*map(float, range(4, 24)), *[0.0] * 12]


def test_ranks_part_stacks() -> None:
    lanes = lay([[16], [16], [16]], ranks=[8, 4, 8])
    assert [(s.rank, s.lanes) for s in lanes.stacks] == [(4, slice(0, 1)), (8, slice(1, 3))]
    assert lanes.order_K.tolist() == [1, 0, 2]


@given(clients, st.sampled_from([8, 16, 32]))
def test_everything_is_found_again(sizes: list[list[int]], multiple: int) -> None:
    lanes = lay(sizes, multiple=multiple)
    x = tokens(lanes, sum(map(sum, sizes)))
    flat = lanes.spread(x)
    assert torch.equal(lanes.collect(flat), x)
    assert torch.equal(lanes.unpad(lanes.pad(flat)), flat)
    assert lanes.num_tokens % STEP == 0
    assert sum(s.cut(flat).shape[:2].numel() for s in lanes.stacks) == lanes.num_tokens


@given(clients, clients)
def test_a_lane_is_its_clients_own(mine: list[list[int]], others: list[list[int]]) -> None:
    """Length, and the order of the tokens in it."""
    alone, among = lay(mine[:1]), lay(mine[:1] + others)
    x = tokens(alone, sum(mine[0]))
    far = torch.full((sum(map(sum, others)), 2), -1.0)
    at = among.order_K.tolist().index(0)
    start, stop = among.spans()[at]
    assert torch.equal(among.spread(torch.cat([x, far]))[start:stop], alone.spread(x))
    assert start % STEP == 0


@pytest.mark.parametrize("rows", [1, 16])
def test_at_most_a_tenth_is_padding(rows: int) -> None:
    """Ragged rows of 16 to 96 tokens, 64 clients, one row each or a batch each."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(16, 97, (64, rows), generator=draw)
    lanes = lay(sizes.tolist())
    assert 1 - int(sizes.sum()) / lanes.num_tokens <= 0.1


def test_who_enters_earlier_lies_first() -> None:
    """At every block those that are in are a batch like any other, of the first tokens."""
    lengths = torch.tensor([3, 40, 20, 17, 8, 20])
    owner, entry = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([2, 1, 2, 0, 1])
    ranks = torch.tensor([8, 4, 8, 8, 4])
    lanes = Lanes(lengths, owner, 16, ranks, None, entry)
    assert entry[lanes.order_K].tolist() == [0, 1, 1, 2, 2]
    flat = lanes.spread(tokens(lanes, int(lengths.sum())))
    assert lanes.entered(2) is lanes
    for block in (0, 1):
        first = lanes.entered(block)
        assert {stack.entry for stack in first.stacks} == set(range(block + 1))
        part = flat[: first.num_tokens]
        assert torch.equal(first.unpad(first.pad(part)), part)
        own = (entry <= block).nonzero().squeeze(1)
        rows = torch.isin(owner, own)
        alone = Lanes(lengths[rows], owner[rows].unique(return_inverse=True)[1], 16, ranks[own])
        assert alone.num_tokens == first.num_tokens
        assert first.spans()[-1][1] == first.num_tokens
        masks = [heap.mask_nT for heap in first.heaps]
        assert sum(int(mask.sum()) for mask in masks) == int(lengths[rows].sum())
        for heap in first.heaps:
            found = heap.cut(first.pad(part))
            assert found[heap.mask_nT].all()
            assert not found[~heap.mask_nT].any()
    assert not lanes.entered(-1).num_tokens
