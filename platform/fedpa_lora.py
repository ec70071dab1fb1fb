"""FedPA on the split language model: a user's adapters, its group's adapters, and a gate.

Zhang et al., "Federated Adaptation for Foundation Model-based Recommendations", IJCAI 2024 (arXiv
2405.04840), brought to LoRA. A user is a client here. This file is the method: its settings, what
leaves a client, and who is mixed with whom. It must not know what an adapter computes (`levels`),
nor where groups come from (`client_groups`).

Shapes: C clients.
"""

from collections.abc import Collection
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fellray.platform.aggregation import (
    Meta,
    Method,
    Mixture,
    Plan,
    Source,
    Weighting,
    mean_row,
)
from fellray.platform.fedpa import mix_groups
from fellray.platform.fellrec import Fellrec
from fellray.platform.levels import GATE, GROUP, USER, level_of
from fellray.platform.model_config import AdapterLevels, Part

CLIENTS = "group"
"""The attribute of `Meta.groups` that says in which group each client is."""


class FedpaLora(Method):
    """FedPA's user adapters (PRIVATE), group adapters (GROUP) and gate on the language model.

    An adapted projection has an adapter of the client's own, which never leaves it, and one of its
    client group, which is the mean of what the members trained. A gate weighs both for each token.
    """

    kind: Literal["fedpa_lora"] = "fedpa_lora"
    groups: str | dict[str, str] = Field(default_factory=dict)
    """Client -> its group; those who are not named are one more. Or an attribute of the users in
    the prepared data (`gender`): clients whose users have one value of it are a group. Empty: all
    clients are one group."""
    min_group_size: int = Field(default=3, ge=1)
    """Groups with fewer clients are one, `other`. From a mean of two either member could work out
    what the other sent."""
    user: tuple[Part, ...] = ("bottom", "top")
    """Parts of the model with user adapters. The trunk is the server's and cannot have any. Empty:
    there are group adapters only."""
    group: tuple[Part, ...] = Field(default=("bottom", "top"), min_length=1)
    """Parts of the model with group adapters. In the trunk (`[bottom, trunk, top]`) the server sees
    which clients are a group. Without it the trunk stays as it was pre-trained."""
    gate: Literal["everyone", "group", "private", "none"] = "everyone"
    """Whose gates are: one mean for all clients, as in the paper; the group's mean; each client's
    own, never sent. `none`: both adapters are just added up."""
    weighting: Weighting = "uniform"
    """Every client counts the same in a mean, or by the histories it read this round."""
    mixture: Fellrec | None = None
    """Ours: FELLRec's settings. Each client then takes of its group's members as FELLRec would, by
    similarity and learning degree, instead of the group's mean."""

    @model_validator(mode="after")
    def _can_be_placed(self) -> Self:
        if "trunk" in self.user:
            raise ValueError(
                "user has 'trunk': a user's adapter never leaves its client, which would have to "
                "work on each trunk projection's input, a round trip more for each; leave trunk to "
                "group"
            )
        if "trunk" in self.group and self.min_group_size < 2:
            raise ValueError(
                "group has 'trunk': its adapters tell the server who is in a group, which must "
                "have two members at least; set min_group_size to 2 or more"
            )
        return self

    def levels(self) -> AdapterLevels:
        """As `user`, `group` and `gate` say."""
        return AdapterLevels(user=self.user, group=self.group, gated=self.gate != "none")

    def compares(self) -> Collection[Source]:
        """As FELLRec within groups; without, nobody with anybody."""
        return self.mixture.compares() if self.mixture else ()

    def compares_layers(self) -> bool:
        """As FELLRec within groups."""
        return self.mixture is not None and self.mixture.compares_layers()

    def begins_alike(self) -> bool:
        """As FELLRec within groups."""
        return self.mixture is None or self.mixture.begins_alike()

    def reads_losses(self) -> bool:
        """As FELLRec within groups."""
        return self.mixture is not None

    def sends(self, block: str) -> bool:
        """All but users' adapters, and gates that are private."""
        level = level_of(block)
        return level != USER and not (level == GATE and self.gate == "private")

    def plan(self, meta: Meta) -> Plan:
        """Users' blocks: the identity. Groups': the mean of the group, or FELLRec's matrix in it.

        Raises:
            ValueError: nothing is known of groups.
        """
        if CLIENTS not in meta.groups:
            raise ValueError("the clients' groups are not known: `Meta.groups` is empty")
        group_C, row_C = meta.groups[CLIENTS], mean_row(meta, self.weighting)
        mean = Mixture(mix_groups(group_C, row_C), within=CLIENTS)
        own = Mixture(torch.eye(len(row_C), dtype=torch.float64))
        everyone = Mixture(row_C.repeat(len(row_C), 1), common=True)
        gates = {"everyone": everyone, "group": mean, "private": own, "none": own}[self.gate]
        of_level = {USER: own, GROUP: mean, GATE: gates}
        blocks = {block: of_level[level_of(block)] for block in meta.blocks}
        if not self.mixture:
            return Plan(mean.mixing_CC, blocks=blocks)
        plan, masked = self.mixture.plan(meta), dict[int, Mixture]()
        for block in meta.blocks:
            if level_of(block) == GROUP:
                mixing_CC = plan.blocks[block].mixing_CC if block in plan.blocks else plan.mixing_CC
                blocks[block] = masked.setdefault(
                    id(mixing_CC), Mixture(mask_groups(mixing_CC, group_C))
                )
        return Plan(mask_groups(plan.mixing_CC, group_C), plan.notes, blocks=blocks)


def mask_groups(mixing_CC: Tensor, group_C: Tensor) -> Tensor:
    """What a matrix gives to clients of the same group, rows divided by their sum [C, C]."""
    within_CC = mixing_CC * (group_C[:, None] == group_C)
    return within_CC / within_CC.sum(1, keepdim=True)
