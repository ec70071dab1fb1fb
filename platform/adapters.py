"""LoRA adapters of many clients: where they sit, how they start, how one lies in a flat row.

The fields are those of peft's `LoraConfig`. A client's parameters of one part of the model are one
flat row, and every matrix is a view of it. The row has the run's largest rank; a client of a
smaller one has the first components of every site, and zeros for the rest: what clients send and
mix is so of one layout (HetLoRA, Cho et al., EMNLP 2024).

It must not know who trains them, nor by which optimizer.

Shapes: S rows, s of them, N rows of a step, P parameters of one client, r rank.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fellray.platform.model_config import LoraSpec

Pair = tuple[Tensor, Tensor]
"""A [N, r, d_in] and B [N, d_out, r] of one projection: row i carries its own client's."""


@dataclass(frozen=True)
class Site:
    """One adapted projection."""

    path: str
    """Its name in the whole model, as in peft's state dict."""
    d_in: int
    d_out: int
    cuts: range | None = None
    """With which cuts a client has it on this side, where cuts differ; None: with any."""
    level: str = ""
    """Which of a projection's adapters it is, where one has several; see `levels`."""

    @property
    def name(self) -> str:
        """Tells it from the projection's other adapters."""
        return f"{self.path}.{self.level}" if self.level else self.path

    def has(self, cut: int) -> bool:
        """Whether a client of this cut has it on this side."""
        return self.cuts is None or cut in self.cuts

    def num_parameters(self, r: int) -> int:
        """Numbers in A and B."""
        return r * (self.d_in + self.d_out)


class LoraLinear(nn.Module):
    """A frozen projection to which each row's own low-rank product is added."""

    def __init__(self, base: nn.Linear, scaling: float):
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.pairs: tuple[Pair, ...] = ()
        """Set for one forward by the part that owns this module; none: the base alone."""

    def forward(self, x_NTd: Tensor) -> Tensor:
        """base(x) + scaling * B (A x), summed over the row's adapters."""
        y: Tensor = self.base(x_NTd)
        for a, b in self.pairs:
            y = y + torch.bmm(torch.bmm(x_NTd, a.mT), b.mT) * self.scaling
        return y


def start(sites: Sequence[Site], spec: LoraSpec, seed: int, client: str = "") -> Tensor:
    """The one start that every client shares [P]: A Kaiming-uniform as in peft, B zero.

    Each site draws from a generator of its own, so that its numbers do not depend on where the
    model is cut.

    Args:
        client: whose start it is, where each has its own.
    """
    rows = []
    for site in sites:
        name = f"{client}:{site.name}" if client else site.name
        generator = torch.Generator().manual_seed(_mix(seed, name))
        a = torch.empty(spec.r, site.d_in)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        rows += [a.flatten(), torch.zeros(site.d_out * spec.r)]
    return torch.cat(rows) if rows else torch.empty(0)


def views(flat_SP: Tensor, sites: Sequence[Site], r: int) -> list[Pair]:
    """Every site's A [S, r, d_in] and B [S, d_out, r] as views of stacked flat rows."""
    pairs, at = [], 0
    for site in sites:
        a = flat_SP[:, at : at + r * site.d_in].unflatten(1, (r, site.d_in))
        at += r * site.d_in
        b = flat_SP[:, at : at + r * site.d_out].unflatten(1, (site.d_out, r))
        at += r * site.d_out
        pairs.append((a, b))
    return pairs


def name_blocks(sites: Sequence[Site], r: int) -> dict[str, slice]:
    """Columns of every site's factors in a flat row: in their order, under peft's names."""
    blocks, at = {}, 0
    for site in sites:
        for factor, width in (("lora_A", site.d_in), ("lora_B", site.d_out)):
            blocks[f"{site.name}.{factor}"] = slice(at, at + r * width)
            at += r * width
    return blocks


def find_columns(blocks: Mapping[str, slice], sent: Callable[[str], bool]) -> Tensor | None:
    """The columns of the blocks that are sent, ascending; None: of all."""
    kept = [columns for name, columns in blocks.items() if sent(name)]
    if len(kept) == len(blocks):
        return None
    spans = [torch.arange(columns.start, columns.stop) for columns in kept]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def cut_(pairs: Sequence[Pair], rows_s: Tensor, ranks_s: Tensor) -> None:
    """Leave each of some rows only the components of its own rank, in place.

    Args:
        pairs: `views` of stacked rows at the largest rank.
        rows_s: distinct rows.
        ranks_s: their ranks.
    """
    for rank in ranks_s.unique().tolist():
        rows = rows_s[ranks_s == rank]
        for a, b in pairs:
            if rank < a.shape[1]:
                a[rows, rank:] = 0.0
                b[rows, :, rank:] = 0.0


def rescale(pairs: Sequence[Pair], spec: LoraSpec, ranks: Sequence[int]) -> list[Pair]:
    """Stacked adapters as `LoraLinear` takes them: it scales all rows as of rank `spec.r`, and the
    B of a smaller rank carries the difference.

    Args:
        pairs: row i has rank `ranks[i]`.
    """
    scales = [spec.scaling_of(rank) / spec.scaling for rank in ranks]
    return [(a, b * b.new_tensor(scales)[:, None, None]) for a, b in pairs]


def _mix(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=7).digest())
