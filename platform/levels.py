"""Adapters of two levels on one projection, a user's and its group's, and the gate between them.

FedPA's adapters (Zhang et al., IJCAI 2024, arXiv 2405.04840) on the projections of a language
model. Each is a site of its own, so that whoever trains, keeps, sends and mixes adapters needs to
know nothing of levels. It must not know who is in which group, nor what leaves a client.

Shapes: n rows of one padded length T, i and o widths of a projection, r rank.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fellray.platform.adapters import LoraLinear, Pair, Site
from fellray.platform.model_config import AdapterLevels, Part

USER, GROUP, GATE = "user", "group", "gate"
"""Levels of a site, as they stand in the names of blocks (``...query.user.lora_A``)."""

BRANCHES = 3
"""What a gate weighs: the frozen projection, the group's adapter, the user's."""


def spread_levels(sites: Sequence[Site], part: str, levels: AdapterLevels) -> list[Site]:
    """The sites of a part, once for each of its levels: the groups', the users', the gates'.

    A gate has the adapters' rank as its inner width. Its A has a column more than the projection's
    input, the inner bias.

    Args:
        sites: one per adapted projection.
        part: bottom, trunk or top.
    """
    own: dict[str, tuple[Part, ...]] = {GROUP: levels.group, USER: levels.user}
    here = [level for level, parts in own.items() if part in parts]
    found = [replace(site, level=level) for level in here for site in sites]
    if levels.gated and len(here) == len(own):
        found += [replace(s, d_in=s.d_in + 1, d_out=BRANCHES, level=GATE) for s in sites]
    return found


def level_of(block: str) -> str:
    """Which level a block is of, by its name."""
    return block.rsplit(".", 2)[-2]


class GatedLinear(LoraLinear):
    """A frozen projection with a group's adapter, a user's, and a gate that weighs them by token.

    With c = base(x), a = scaling * B (A x) of either adapter, and the gate's own G1, p and G2:

        pi = softmax(G2 relu(G1 x + p))
        y  = c + 3 (pi_1 a_group + pi_2 a_user)

    G2 begins as zeros: both adapters then count 1, as if they were just added up, and they can
    count between 0 and 3. pi_0 is the frozen projection's: what a token gives it, it takes from the
    adapters. c itself is not scaled, unlike in the paper, whose layers stand alone.
    """

    def forward(self, x_nTi: Tensor) -> Tensor:
        """base(x), and what the gate lets through; without adapters the base alone."""
        y: Tensor = self.base(x_nTi)
        if not self.pairs:
            return y
        *adapters, gate = self.pairs
        shares_nTk = weigh(x_nTi, gate)
        for at, (a, b) in enumerate(adapters, 1):
            low = torch.bmm(torch.bmm(x_nTi, a.mT), b.mT) * self.scaling
            y = y + shares_nTk[:, :, at : at + 1] * low
        return y


def weigh(x_nTi: Tensor, gate: Pair) -> Tensor:
    """What each branch counts for each token [n, T, 3]: 3 in all, 1 each where G2 is zero."""
    inner, outer = gate
    hidden_nTr = torch.relu(torch.bmm(x_nTi, inner[:, :, :-1].mT) + inner[:, None, :, -1])
    return torch.softmax(torch.bmm(hidden_nTr, outer.mT), dim=2) * BRANCHES
