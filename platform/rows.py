"""Rows of different lengths, packed for the wire and padded for the model.

A row's padded length is a rule on that row alone, so whoever shares its batch never changes its
bits. Packed tensors hold real tokens only: padding is made where it is needed and never sent.

Shapes: N rows, L real tokens of all rows together, n rows of one padded length T, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHORTEST = 16
"""Fewest tokens in a padded row: shorter matrix products take other kernels, with other bits."""


def padded_length(lengths_N: Tensor, multiple: int) -> Tensor:
    """The tokens each row is computed with: its length rounded up, at least `SHORTEST` [N]."""
    return ((lengths_N + multiple - 1) // multiple * multiple).clamp(min=SHORTEST)


@dataclass(frozen=True)
class Group:
    """The rows of one padded length."""

    rows_n: Tensor
    """Their places in the batch, ascending: a client's rows keep their order."""
    mask_nT: Tensor
    """True at real tokens."""
    tokens: Tensor
    """Places of their real tokens in the packed tensor, row after row."""


class Rows:
    """How a batch of rows is packed and padded."""

    def __init__(self, lengths_N: Tensor, multiple: int, device: torch.device | None = None):
        """Args: lengths_N: real tokens per row, int64, on the CPU. multiple: the padding rule's."""
        self.lengths_N = lengths_N
        ends = lengths_N.cumsum(0)
        starts = ends - lengths_N
        padded = padded_length(lengths_N, multiple)
        self.num_tokens = int(ends[-1]) if len(ends) else 0
        self.groups = []
        for length in padded.unique().tolist():
            rows = (padded == length).nonzero().squeeze(1)
            place = torch.arange(length)
            mask = place < lengths_N[rows, None]
            tokens = (starts[rows, None] + place)[mask]
            self.groups.append(Group(rows.to(device), mask.to(device), tokens.to(device)))

    def pad(self, packed_Ld: Tensor, group: Group) -> Tensor:
        """One group's rows [n, T, d], zeros at padding."""
        padded = packed_Ld.new_zeros(*group.mask_nT.shape, packed_Ld.shape[1])
        return padded.index_put((group.mask_nT,), packed_Ld[group.tokens])

    def pack(self, padded: Sequence[Tensor]) -> Tensor:
        """The groups' rows [n, T, d], in the order of `groups`, as one packed tensor [L, d]."""
        real = [h[g.mask_nT] for g, h in zip(self.groups, padded, strict=True)]
        places = torch.cat([g.tokens for g in self.groups])
        if len(self.groups) == 1:  # already in place: a row's tokens are in order
            return real[0]
        return (
            torch.cat(real)
            .new_empty(self.num_tokens, real[0].shape[1])
            .index_copy(0, places, torch.cat(real))
        )
