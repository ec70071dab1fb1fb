"""Averaging products: the mean of the clients' B A, which the product of the means is not.

FedEx-LoRA (Singhal et al., "Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models", arXiv 2410.09432) averages A and B and adds what is lost by that, ``mean(B A) - mean(B)
mean(A)``, to the frozen weights of every client and of the server.

Bounded, the frozen weights stay what they are, as one read-only copy for all clients of a node and
the public model of what is exported or served: of all adapters of the rank the one whose product is
nearest to ``mean(B A)`` is taken (Eckart and Young 1936). Its error is never larger than that of
the product of the means, and none where the clients' products together have no larger rank.

Shapes: C clients, P parameters of one client, r rank, K = C r.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fellray.platform.aggregation import Meta, Plan, mean_row, name_layers
from fellray.platform.averaging import Averaging
from fellray.platform.server_step import RESIDUAL, Snapshot, State

SMALLEST = 1e-7
"""Singular values below this share of the largest are rounding of fp32 weights, not directions."""


def nearest_adapter(a_Cri: Tensor, b_Cor: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and B [d_out, r] with the product of rank r nearest to ``sum_c w_c B_c A_c``.

    A product has many factorings. Here A has orthogonal rows of one length, that of the mean A on
    average, and lies as near to the mean A as such a matrix can (Schoenemann 1966), so that clients
    go on from about the A they had.

    Args:
        a_Cri: A of each client.
        b_Cor: B of each client.
        weight_C: what each counts; they sum to one.
    """
    rank = a_Cri.shape[1]
    a, b, weight_C = a_Cri.double(), b_Cor.double(), weight_C.double()
    mean_a = torch.einsum("c,cri->ri", weight_C, a)
    left = (weight_C[:, None, None] * b).transpose(0, 1).flatten(1)  # [d_out, K]
    right_q, right_r = torch.linalg.qr(a.flatten(0, 1).T)  # [d_in, k], [k, K]
    u, s, vh = torch.linalg.svd(left @ right_r.T, full_matrices=False)
    kept = int((s[:rank] > SMALLEST * s[0].clamp(min=torch.finfo(s.dtype).tiny)).sum())
    rows = vh[:kept] @ right_q.T  # [kept, d_in]
    # directions that the product does not use are left to the mean A's
    rest = mean_a - (mean_a @ rows.T) @ rows
    rows = torch.cat([rows, torch.linalg.svd(rest, full_matrices=False)[2][: rank - kept]])
    turned_u, _, turned_vh = torch.linalg.svd(mean_a @ rows.T)
    turn = turned_u @ turned_vh  # [r, r], orthogonal
    length = (mean_a.square().sum() / rank).sqrt()
    scaled_u = torch.zeros(b.shape[1], rank, dtype=torch.float64)
    scaled_u[:, :kept] = u[:, :kept] * s[:kept]
    return length * turn @ rows, scaled_u @ turn.T / length


@dataclass(frozen=True)
class NearestProduct:
    """Every projection's mean product at the adapters' rank, in place of the product of means."""

    weight_C: Tensor
    """What each client counts."""

    def take(self, seen: Snapshot, state: State) -> tuple[Tensor, State]:
        """See `ServerStep`; in fp64, without state. Where the mean A is zero it stays mixed."""
        new_1P, rank = seen.mixed_RP.clone(), seen.rank
        for columns_a, columns_b in _pairs(seen.blocks).values():
            a_Cri = seen.sent_CP[:, columns_a].unflatten(1, (rank, -1))
            b_Cor = seen.sent_CP[:, columns_b].unflatten(1, (-1, rank))
            if seen.mixed_RP[:, columns_a].any():
                a, b = nearest_adapter(a_Cri, b_Cor, self.weight_C)
                new_1P[:, columns_a] = a.flatten().to(new_1P.dtype)
                new_1P[:, columns_b] = b.flatten().to(new_1P.dtype)
        return new_1P, {}


@dataclass(frozen=True)
class ExactProduct:
    """The product of the means, and what it lacks of the mean product as a residual."""

    weight_C: Tensor
    """What each client counts."""

    def take(self, seen: Snapshot, state: State) -> tuple[Tensor, State]:
        """See `ServerStep`; in fp64. State: a residual for each projection that is sent."""
        added, rank = dict(state), seen.rank
        for layer, (columns_a, columns_b) in _pairs(seen.blocks).items():
            a_Cri = seen.sent_CP[:, columns_a].unflatten(1, (rank, -1)).double()
            b_Cor = seen.sent_CP[:, columns_b].unflatten(1, (-1, rank)).double()
            left = (self.weight_C[:, None, None] * b_Cor).transpose(0, 1).flatten(1)
            wanted = left @ a_Cri.flatten(0, 1)  # [d_out, d_in]
            mean_a = seen.mixed_RP[0, columns_a].unflatten(0, (rank, -1)).double()
            mean_b = seen.mixed_RP[0, columns_b].unflatten(0, (-1, rank)).double()
            name = f"{RESIDUAL}{layer}"
            before = state[name].double() if name in state else 0.0
            added[name] = (before + wanted - mean_b @ mean_a).float()
        return seen.mixed_RP, added


class FedExLora(Averaging):
    """FedEx-LoRA: clients start the next round from the exact mean of their models.

    Frozen weights change every round, so each process has its own of the adapted projections, and a
    client receives d_out d_in numbers for each of its own besides the adapters. A run is exported
    with its frozen weights, and not served.
    """

    kind: Literal["fedex_lora"] = "fedex_lora"

    def mixes_products(self) -> bool:
        """Of one rank."""
        return True

    def moves_base(self) -> bool:
        """By what the product of the means lacks."""
        return True

    def plan(self, meta: Meta) -> Plan:
        """One constant row, and the step that keeps what is left over."""
        return replace(super().plan(meta), step=ExactProduct(mean_row(meta, self.weighting)))


class FedExLoraBounded(Averaging):
    """FedEx-LoRA with its residual bounded to the adapter's rank: not exact, and never further from
    the mean product than averaging A and B is. The published method is in no run of fellray."""

    kind: Literal["fedex_lora_bounded"] = "fedex_lora_bounded"

    def mixes_products(self) -> bool:
        """Of one rank."""
        return True

    def plan(self, meta: Meta) -> Plan:
        """One constant row, and the step from products."""
        return replace(super().plan(meta), step=NearestProduct(mean_row(meta, self.weighting)))


def _pairs(blocks: Mapping[str, slice]) -> dict[str, tuple[slice, slice]]:
    """Projection -> the columns of its A and B."""
    layers = name_layers(blocks)
    return {name: (blocks[f"{name}.lora_A"], blocks[f"{name}.lora_B"]) for name in layers}
