"""The middle: blocks that some clients hold themselves and the server holds of the others.

Clients' rows have a column for each block they hold or might hold, and so have the server's; what
is sent has each block once, by its name, whoever holds it. So mixing does not care where a client's
model is cut, and no side is given what the other holds. It must not know how rows are mixed.

Shapes: C clients, P parameters of one client: all that is sent, or one side's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fellray.platform.adapters import Site


class Middle:
    """Where these blocks' columns lie: in a client's row of bottom and top, and first in the
    server's; what is sent is the former, and then the rest of the latter."""

    def __init__(self, ends: Sequence[Site], r: int):
        """Args: ends: sites of bottom and top. r: the rank of all rows."""
        self._sites = [site for site in ends if site.cuts is not None]
        self._sizes = [site.num_parameters(r) for site in self._sites]
        before = next((at for at, site in enumerate(ends) if site.cuts is not None), 0)
        start = sum(site.num_parameters(r) for site in ends[:before])
        self.columns = slice(start, start + sum(self._sizes))
        """Of a client's row."""

    @property
    def empty(self) -> bool:
        """Whether all have one cut."""
        return not self._sites

    def without(self, trunk: Sequence[Site]) -> list[Site]:
        """The server's other sites."""
        return [site for site in trunk if site.cuts is None]

    def join_(self, sent_CP: Tensor, held_CP: Tensor, cuts: Sequence[int]) -> None:
        """Put what the server holds into rows in which the clients' own part stands, in place."""
        size = self.columns.stop - self.columns.start
        sent_CP[:, sent_CP.shape[1] - held_CP.shape[1] + size :] = held_CP[:, size:]
        self.fill_(sent_CP, held_CP, cuts)

    def fill_(self, own_CP: Tensor, held_CP: Tensor, cuts: Sequence[int]) -> None:
        """Put the middle that the server holds into clients' rows, in place."""
        middle_CP = own_CP[:, self.columns]
        for columns, own_C in self._own(cuts):
            middle_CP[~own_C, columns] = held_CP[~own_C, columns]

    def clear_(self, part_CP: Tensor, at_server: bool, cuts: Sequence[int]) -> None:
        """Leave one side's rows what it holds of each client, in place."""
        middle_CP = part_CP[:, : sum(self._sizes)] if at_server else part_CP[:, self.columns]
        for columns, own_C in self._own(cuts):
            middle_CP[own_C if at_server else ~own_C, columns] = 0.0

    def _own(self, cuts: Sequence[int]) -> list[tuple[slice, Tensor]]:
        """For each site its columns of the middle, and which clients hold it themselves [C]."""
        found, at = [], 0
        for site, size in zip(self._sites, self._sizes, strict=True):
            own_C = torch.tensor([site.has(cut) for cut in cuts], dtype=torch.bool)
            found.append((slice(at, at + size), own_C))
            at += size
        return found
