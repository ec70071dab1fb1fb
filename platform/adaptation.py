"""Adaptation: many clients' gated adapters on one frozen backbone, in one batched pass.

For a hidden layer with input x, frozen c = ReLU(x W), adapters a_k = s x A_k B_k of the user and of
each of its groups, and pi = softmax(ReLU(x G1) G2):

    x <- pi_0 c / pi_0(start) + pi_1 a_user + sum_k pi_{1+k} a_group(k)

Each client's part of a product is a product of its own, of a shape that follows from that client
alone; sums over its rows are products as well. So whoever shares the batch never changes its bits.
A batch of one product would be taken otherwise than one of several, so there are always two clients
or more. This file must not know who the clients are, nor what becomes of what they trained.

Shapes: S clients side by side, at least 2, B rows of each (a power of two), P numbers of one
client, K groups of one client, r rank.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fellray.platform.attribute_model import Backbone, Shape
from fellray.platform.errors import FellrayError
from fellray.platform.fedpa import GROUP, Fedpa


@dataclass(frozen=True)
class Part:
    """One tensor of a client's trained state."""

    name: str
    shape: tuple[int, ...]
    rate: float

    @property
    def size(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)


class Layout:
    """What a client trains, in order: what stays with it, then what it sends.

    Private: `embedding` (what is added to its pre-trained user rows) and `user.<layer>.A`, `.B`.
    Sent: `group.<attribute>.<layer>.A`, `.B`, `gate.<layer>.1`, `.2`, `output`.
    """

    def __init__(self, shape: Shape, method: Fedpa):
        """Raises: FellrayError: `method.gate_dim` has another length than there are layers."""
        if len(method.gate_dim) != len(shape.layers):
            raise FellrayError(
                f"method.gate_dim has {len(method.gate_dim)} widths {list(method.gate_dim)}, but "
                f"the backbone has {len(shape.layers)} hidden layers {list(shape.layers)}: give "
                "one width per layer"
            )
        self.shape, self.method = shape, method
        rates, pairs = method.rates, list(zip(shape.widths, shape.widths[1:], strict=False))
        self.branches = 2 + len(method.groups)
        """What a gate weighs: the frozen layer, the user's adapter, one of each group."""

        def adapter(name: str, rate: float) -> list[Part]:
            return [
                part
                for at, (wide, narrow) in enumerate(pairs)
                for part in (
                    Part(f"{name}.{at}.A", (wide, method.rank), rate),
                    Part(f"{name}.{at}.B", (method.rank, narrow), rate),
                )
            ]

        embedding = Part("embedding", (1, shape.user_width), rates.embedding)
        self.private = [embedding, *adapter("user", rates.user)]
        self.groups = {g: adapter(GROUP + g, rates.group) for g in method.groups}
        gates = [
            part
            for at, ((wide, _), gate) in enumerate(zip(pairs, method.gate_dim, strict=True))
            for part in (
                Part(f"gate.{at}.1", (wide + 1, gate), rates.gate),
                Part(f"gate.{at}.2", (gate + 1, self.branches), rates.gate),
            )
        ]
        self.common = [*gates, Part("output", (shape.widths[-1] + 1, 1), rates.output)]
        self.parts = [*self.private, *(p for ps in self.groups.values() for p in ps), *self.common]
        self.sent = [p for p in self.parts[len(self.private) :] if p.rate]
        """What is not trained is not sent."""
        self.scale = 1.0
        """What the frozen branch is multiplied by: its gate's weight at the start, divided out."""
        if not method.as_published:
            lead = math.exp(method.gate_bias)
            self.scale = (lead + self.branches - 1) / lead

    @property
    def private_size(self) -> int:
        """Numbers that stay with a client."""
        return sum(p.size for p in self.private)

    @property
    def adapter_size(self) -> int:
        """Numbers of one adapter on all layers."""
        return sum(p.size for p in self.private[1:])

    @property
    def common_size(self) -> int:
        """Numbers of the gates and the output layer."""
        return sum(p.size for p in self.common)

    def blocks(self) -> dict[str, slice]:
        """Sent blocks and their columns: one of each attribute, `gate`, `output`."""
        found, at = {}, 0
        for name, parts in (
            *((GROUP + g, parts) for g, parts in self.groups.items()),
            ("gate", self.common[:-1]),
            ("output", self.common[-1:]),
        ):
            if size := sum(p.size for p in parts if p in self.sent):
                found[name] = slice(at, at + size)
                at += size
        return found

    def count(self) -> dict[str, int]:
        """Numbers by what becomes of them."""
        own, adapter = self.shape.count(), self.adapter_size
        return {
            "backbone": own["backbone"],
            "frozen": own["item_tables"] + own["layers"],
            "adapter": adapter,
            "gate": self.common_size - self.common[-1].size,
            "private": self.private_size,
            "upload": sum(p.size for p in self.sent),
        }

    def start(self, seed: int, backbone: Backbone) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Where everybody begins: private [P], each attribute's adapter [Q], gates and output [R].

        As published the adapters are zeros and the gates random. Otherwise an adapter's A is
        N(0, 1 / inputs), the same for all clients and all groups of an attribute, since a mean of
        different A would shrink towards zero. A user's and those of different attributes differ:
        alike, they would see one gradient, and what is sent would be what is private, bit for bit.
        """
        draw = torch.Generator().manual_seed(seed)
        published = self.method.as_published

        def first(part: Part) -> Tensor:
            name = part.name
            if name == "output":
                return backbone.output
            if name.startswith("gate"):
                wide = part.shape[0] - 1
                random: Tensor = (torch.rand(part.shape, generator=draw) * 2 - 1) * wide**-0.5
                if published or name.endswith("1"):
                    return random
                constant = torch.zeros(part.shape)
                constant[-1, 0] = self.method.gate_bias
                return constant
            drawn = torch.randn(part.shape, generator=draw) * part.shape[0] ** -0.5
            alive = name.endswith("A") and not published
            return drawn if alive else torch.zeros(part.shape)

        def flat(parts: Sequence[Part]) -> Tensor:
            return torch.cat([first(p).flatten() for p in parts])

        private = flat(self.private)
        private[: self.private[0].size] = 0.0
        groups = {attribute: flat(parts) for attribute, parts in self.groups.items()}
        return private, groups, flat(self.common)


@dataclass(frozen=True)
class Rows:
    """The samples of some clients, as many rows of each; padding rows have weight 0."""

    base_SU: Tensor
    """Pre-trained embeddings of each client's user."""
    items_SBI: Tensor
    """Embeddings of the items."""
    labels_SB: Tensor
    weights_SB: Tensor
    """1 for a sample, 0 for padding."""


def score(
    layout: Layout, layers: Sequence[Tensor], own: Mapping[str, Tensor], rows: Rows
) -> Tensor:
    """Logits [S, B] of all clients' samples under their own parts.

    Args:
        layers: the frozen matrices [in + 1, out].
        own: part -> [S, ...].
    """
    clients, num_rows, _ = rows.items_SBI.shape
    assert clients > 1, "who is alone is there twice"
    ones_SB1 = rows.items_SBI.new_ones(clients, num_rows, 1)
    user_S1U = rows.base_SU[:, None] + own["embedding"]
    x = torch.cat([torch.bmm(ones_SB1, user_S1U), rows.items_SBI], 2)
    method, names = layout.method, ["user", *(GROUP + g for g in layout.method.groups)]
    for at, layer in enumerate(layers):
        x1 = torch.cat([x, ones_SB1], 2)
        frozen = torch.relu(torch.bmm(x1, layer.expand(clients, -1, -1)))
        gate = torch.cat([torch.relu(torch.bmm(x1, own[f"gate.{at}.1"])), ones_SB1], 2)
        share = torch.softmax(torch.bmm(gate, own[f"gate.{at}.2"]), 2)
        down = torch.cat([own[f"{name}.{at}.A"] for name in names], 2)
        up = torch.cat([own[f"{name}.{at}.B"] for name in names], 1)
        low = torch.bmm(x, down).unflatten(2, (len(names), method.rank))
        weighed = (low * share[:, :, 1:, None] * (method.alpha / method.rank)).flatten(2)
        x = frozen * (share[:, :, :1] * layout.scale) + torch.bmm(weighed, up)
    return torch.bmm(torch.cat([x, ones_SB1], 2), own["output"])[:, :, 0]


def unpack(parts: Sequence[Part], flat_SP: Tensor) -> dict[str, Tensor]:
    """Rows of numbers as the parts they are made of, [S, ...] each."""
    pieces = flat_SP.split([p.size for p in parts], 1)
    return {p.name: piece.reshape(-1, *p.shape) for p, piece in zip(parts, pieces, strict=True)}


def pack(parts: Sequence[Part], own: Mapping[str, Tensor]) -> Tensor:
    """Parts as rows of numbers [S, P]."""
    # cat takes no empty list
    nothing = next(iter(own.values())).new_empty(len(next(iter(own.values()))), 0)
    return torch.cat([nothing, *(own[p.name].flatten(1) for p in parts)], 1)


BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Adam's, as torch has them."""


def train(
    layout: Layout,
    layers: Sequence[Tensor],
    own: Mapping[str, Tensor],
    batches: Iterable[Rows],
    factor: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """Some steps of Adam, which begins anew, for clients side by side, each by its own mean loss.

    Args:
        own: part -> [S, ...]; stays as it is.
        batches: one step each.
        factor: what all rates are multiplied by.

    Returns:
        What the parts become, and for each client the losses of all its samples, summed [S], fp64.
    """
    trained = [p for p in layout.parts if p.rate]
    values = dict(own)
    first = {p.name: torch.zeros_like(own[p.name]) for p in trained}
    second = {p.name: torch.zeros_like(own[p.name]) for p in trained}
    told = torch.zeros(len(own["output"]), dtype=torch.float64)
    for step, rows in enumerate(batches, start=1):
        leaves = [values[p.name].detach().requires_grad_() for p in trained]
        here = values | {p.name: leaf for p, leaf in zip(trained, leaves, strict=True)}
        losses_SB = torch.nn.functional.binary_cross_entropy_with_logits(
            score(layout, layers, here, rows), rows.labels_SB, reduction="none"
        )
        share_SB = rows.weights_SB / rows.weights_SB.sum(1, keepdim=True)
        gradients = torch.autograd.grad(losses_SB, leaves, share_SB)
        # row after row: how a sum over rows is taken could depend on who is beside
        told += (losses_SB.detach() * rows.weights_SB).double().cumsum(1)[:, -1]
        for part, leaf, gradient in zip(trained, leaves, gradients, strict=True):
            m, v = first[part.name], second[part.name]
            m.mul_(BETA1).add_(gradient * (1 - BETA1))
            v.mul_(BETA2).add_(gradient.square() * (1 - BETA2))
            root = (v / (1 - BETA2**step)).sqrt_().add_(EPS)
            rate = part.rate * factor / (1 - BETA1**step)
            values[part.name] = leaf.detach() - rate * (m / root)
    return values, told
