"""FedPA: what is a user's stays with the user, what is a group's is averaged within the group.

Zhang et al., "Federated Adaptation for Foundation Model-based Recommendations", IJCAI 2024 (arXiv
2405.04840): user adapters (PRIVATE), one adapter per value of each chosen user attribute (GROUP), a
gate and an output layer for all (GLOBAL). This file is the method: its settings, its plan, and who
is in which group. It must not know what an adapter is attached to.

Shapes: C clients.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fellray.platform.aggregation import Meta, Method, Mixture, Plan, Source
from fellray.platform.groups import find_rare
from fellray.platform.section import Section

OTHER = ":other"
"""The group of all values that are too rare for one of their own."""
GROUP = "group."
"""What the names of blocks begin with that are mixed within an attribute's groups."""


class Rates(Section):
    """Learning rates, one per kind of block. 0: the block stays as it began, and is not sent."""

    embedding: float = Field(default=0.1, ge=0)
    """A user's own rows of the user features. PRIVATE."""
    user: float = Field(default=0.003, ge=0)
    """User adapters. PRIVATE."""
    group: float = Field(default=0.003, ge=0)
    """Group adapters. GROUP."""
    gate: float = Field(default=0.01, ge=0)
    """The gates. GLOBAL."""
    output: float = Field(default=0.1, ge=0)
    """The output layer. GLOBAL."""


AS_PUBLISHED = {"min_group_size": 1, "weighting": "uniform", "decay": 1.0}
"""What the released code does wherever `as_published` is given and nothing else is."""
PUBLISHED_RATES = dict.fromkeys(Rates.model_fields, 0.1)
"""Its rates, each of them likewise."""


class Fedpa(Method):
    """FedPA on an attribute backbone; `as_published` is what its released code computes.

    There both factors of every adapter begin as zeros, so that each one's gradient is zero for
    ever; the gate begins at random and weakens the pre-trained layers; and Adam at rate 0.1 begins
    anew with each round. Here A is random, the same for all clients, and B zero; the gate begins
    constant and its weakening is divided out, so that round 0 is the pre-trained backbone.
    """

    kind: Literal["fedpa"] = "fedpa"
    groups: tuple[str, ...] = ()
    """User features whose values are groups; a client is in one group of each. May be empty."""
    min_group_size: int = Field(default=20, ge=1)
    """Values with fewer clients are one group, `other`; 1: every value is a group."""
    weighting: Literal["uniform", "samples"] = "uniform"
    """Every client counts the same, or by the interactions it read this round."""
    rank: int = Field(default=4, ge=1)
    """Rank of every adapter."""
    alpha: float = Field(default=1.0, gt=0)
    """An adapter's output is multiplied by alpha / rank."""
    gate_dim: tuple[int, ...] = (8, 4)
    """Width of each hidden layer's gate, one number per layer."""
    gate_bias: float = 2.0
    """The gate begins with weight e^bias for the frozen layer against 1 for each adapter."""
    rates: Rates = Rates()
    decay: float = Field(default=0.9, gt=0, le=1)
    """All rates are multiplied by this after each round."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a client's training data in a round."""
    batch_size: int = Field(default=1024, ge=1)
    """Interactions in one local step."""
    as_published: bool = False
    """Begin and train as the released code does."""

    @model_validator(mode="before")
    @classmethod
    def _published(cls, values: object) -> object:
        if not isinstance(values, dict) or values.get("as_published") is not True:
            return values
        given = values.get("rates", {})
        rates = {**PUBLISHED_RATES, **given} if isinstance(given, dict) else given
        return {**AS_PUBLISHED, **values, "rates": rates}

    @model_validator(mode="after")
    def _groups_once(self) -> Self:
        twice = [name for name, count in Counter(self.groups).items() if count > 1]
        if twice:
            raise ValueError(f"groups names {twice[0]!r} twice")
        return self

    def compares(self) -> Collection[Source]:
        """Nobody with anybody."""
        return ()

    def reads_losses(self) -> bool:
        """No."""
        return False

    def plan(self, meta: Meta) -> Plan:
        """Group blocks: the mean of the client's group. All others: one mean for everyone.

        Raises:
            ValueError: a group block's attribute is unknown.
        """
        weights = torch.ones_like(meta.samples_C) if self.weighting == "uniform" else meta.samples_C
        everyone_CC = (weights / weights.sum()).expand(len(weights), -1)
        mixtures: dict[str, Mixture] = {}
        for block in meta.blocks:
            if not block.startswith(GROUP):
                continue
            attribute = block.removeprefix(GROUP)
            if attribute not in meta.groups:
                raise ValueError(f"block {block!r} has no groups; known: {sorted(meta.groups)}")
            mixtures[block] = Mixture(mix_groups(meta.groups[attribute], weights))
        return Plan(everyone_CC, common=True, blocks=mixtures)


def mix_groups(group_C: Tensor, weights_C: Tensor) -> Tensor:
    """Who listens to whom within groups [C, C]: M[r, c] = 1{same group} w_c / the group's sum."""
    names, at_C = group_C.unique(return_inverse=True)
    rows_GC = (at_C == torch.arange(len(names))[:, None]) * weights_C
    mixing_CC: Tensor = (rows_GC / rows_GC.sum(1, keepdim=True))[at_C]
    return mixing_CC


def form_groups(values: Sequence[str | None], least: int) -> dict[str | None, str]:
    """Which group each value of an attribute belongs to.

    Rare ones (`find_rare`) are `OTHER`, all others groups of their own.

    Args:
        values: one per client; None is a missing one.
        least: members that a group must have.
    """
    sizes = Counter(values)
    rare = find_rare(sizes, least)
    return {value: OTHER if value in rare else f"={value or ''}" for value in sizes}


def group_clients(
    attributes: Mapping[str, Sequence[str | None]], least: int
) -> dict[str, list[str]]:
    """For each attribute, the name of the group that each client is in."""
    names = {}
    for attribute, values in attributes.items():
        group = form_groups(values, least)
        names[attribute] = [f"{GROUP}{attribute}{group[value]}" for value in values]
    return names
