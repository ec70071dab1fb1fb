"""Packing and padding: a row's shape depends on that row alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fellray.platform.rows import SHORTEST, Rows, padded_length

lengths = st.lists(st.integers(1, 70), min_size=1, max_size=12)
multiples = st.sampled_from([8, 16, 32])


def packed(sizes: list[int], width: int = 3) -> torch.Tensor:
    total = sum(sizes)
    return torch.arange(1.0, 1 + total * width).reshape(total, width)


def test_padded_length_by_hand() -> None:
    real = torch.tensor([1, 8, 9, 16, 17, 31, 33])
    assert padded_length(real, 8).tolist() == [16, 16, 16, 16, 24, 32, 40]
    assert padded_length(real, 16).tolist() == [16, 16, 16, 16, 32, 32, 48]
    assert padded_length(real, 32).tolist() == [32, 32, 32, 32, 32, 32, 64]
    assert SHORTEST == 16


@given(lengths, lengths, multiples)
def test_a_rows_padding_is_its_own(mine: list[int], others: list[int], multiple: int) -> None:
    alone = padded_length(torch.tensor(mine), multiple)
    among = padded_length(torch.tensor(mine + others), multiple)
    assert torch.equal(alone, among[: len(mine)])
    assert bool((alone >= torch.tensor(mine)).all())
    assert bool((alone % multiple == 0).all())


def test_groups_by_hand() -> None:
    rows = Rows(torch.tensor([3, 17, 2]), 16)
    assert rows.num_tokens == 22
    short, long = rows.groups
    assert short.rows_n.tolist() == [0, 2]
    assert short.mask_nT.shape == (2, 16)
    assert short.mask_nT.sum(1).tolist() == [3, 2]
    assert short.mask_nT[0].tolist() == [True] * 3 + [False] * 13
    assert short.tokens.tolist() == [0, 1, 2, 20, 21]
    assert long.rows_n.tolist() == [1]
    assert long.mask_nT.shape == (1, 32)
    assert long.tokens.tolist() == list(range(3, 20))


def test_pad_by_hand() -> None:
    rows = Rows(torch.tensor([2, 1]), 16)
    padded = rows.pad(torch.tensor([[1.0], [2.0], [3.0]]), rows.groups[0])
    assert padded.shape == (2, 16, 1)
    assert padded[0, :3, 0].tolist() == [1.0, 2.0, 0.0]
    assert padded[1, :3, 0].tolist() == [3.0, 0.0, 0.0]
    assert padded.sum().item() == 6.0


@given(lengths, multiples)
def test_pack_undoes_pad(sizes: list[int], multiple: int) -> None:
    rows, x = Rows(torch.tensor(sizes), multiple), packed(sizes)
    assert torch.equal(rows.pack([rows.pad(x, group) for group in rows.groups]), x)


@given(lengths, multiples)
def test_every_row_and_token_is_in_one_group_in_order(sizes: list[int], multiple: int) -> None:
    rows = Rows(torch.tensor(sizes), multiple)
    assert sorted(torch.cat([g.rows_n for g in rows.groups]).tolist()) == list(range(len(sizes)))
    assert sorted(torch.cat([g.tokens for g in rows.groups]).tolist()) == list(range(sum(sizes)))
    for group in rows.groups:
        assert group.rows_n.tolist() == sorted(group.rows_n.tolist())
        assert group.tokens.tolist() == sorted(group.tokens.tolist())


@given(lengths)
def test_what_is_written_at_padding_is_never_sent(sizes: list[int]) -> None:
    rows, x = Rows(torch.tensor(sizes), 16), packed(sizes)
    dirty = [torch.where(g.mask_nT[:, :, None], rows.pad(x, g), torch.nan) for g in rows.groups]
    assert torch.equal(rows.pack(dirty), x)


@pytest.mark.parametrize("sizes", [[5], [5, 30, 7, 40]])
def test_gradients_flow_back_to_each_token_once(sizes: list[int]) -> None:
    rows, x = Rows(torch.tensor(sizes), 16), packed(sizes).requires_grad_()
    weight = packed(sizes).flip(0)
    (rows.pack([rows.pad(x, g) for g in rows.groups]) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
