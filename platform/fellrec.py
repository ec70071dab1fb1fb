"""FELLRec's dynamic balance: similarity decides whom a client listens to, its loss how far yet.

Zhao et al., "A Federated Framework for LLM-based Recommendation", Findings of NAACL 2025
(arXiv 2402.09959). The formulas are pure functions on fp64 tensors; `Fellrec.plan` composes them.

Shapes: C clients.
"""

from collections.abc import Callable, Collection
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fellray.platform.aggregation import Meta, Method, Plan, Source, cosine


def loss_share(losses_C: Tensor, temperature: float) -> Tensor:
    """Learning difficulty [C]: softmax of the clients' losses; the worst client has the largest."""
    return torch.softmax(losses_C.double() / temperature, dim=0)


def learning_degree(share_C: Tensor, alpha: float, exponent: float) -> Tensor:
    """w_c = tanh(alpha / share_c ** exponent) [C], in (0, 1].

    As intended the exponent is t / beta: w grows with the rounds and falls with the loss, so a
    client that fits badly relies on itself first ("curriculum heating").
    """
    return torch.tanh(alpha / share_C.double().pow(exponent))


def affine_attention(similarity_CC: Tensor) -> Tensor:
    """a = (1 + s) / 2 [C, C]: cosine mapped to [0, 1]."""
    return (1 + similarity_CC).div_(2)


def softmax_attention(similarity_CC: Tensor, tau: float) -> Tensor:
    """Ours: softmax over the *other* clients at temperature tau; each row's others sum to one."""
    others = similarity_CC.clone().fill_diagonal_(-torch.inf)
    if len(others) == 1:
        return torch.zeros_like(others)
    return torch.softmax(others / tau, dim=1)


def top_k_attention(similarity_CC: Tensor, k: int) -> Tensor:
    """Ours: affine attention to the k most similar others only (ties: the smaller client id)."""
    others = similarity_CC.clone().fill_diagonal_(-torch.inf)
    k = min(k, len(others) - 1)
    if k < 1:
        return torch.zeros_like(others)
    least = others.topk(k, dim=1).values[:, -1:]
    nearer, equal = others > least, others == least
    # as many of those at the edge as there is room for, from the smallest id on
    room = k - nearer.sum(dim=1, keepdim=True, dtype=torch.int32)
    keep = nearer | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    return affine_attention(similarity_CC).mul_(keep)


def mixing_matrix(attention_CC: Tensor, degree_C: Tensor) -> Tensor:
    """Rows (1 for oneself, w_c * a_cj for the others), divided by their sum [C, C]."""
    rows = degree_C[:, None] * attention_CC
    rows.fill_diagonal_(1.0)
    return rows.div_(rows.sum(dim=1, keepdim=True))


def mixing_matrix_in_place(
    attention_of: Callable[[Tensor], Tensor], degree_C: Tensor, num_clients: int
) -> Tensor:
    """The published defect: client c is mixed from weights already overwritten for 0..c-1.

    Args:
        attention_of: attention [C, C] for stored weights ``E @ theta``, given E [C, C].
        degree_C: learning degrees.
        num_clients: C.

    Returns:
        The matrix on the round's snapshot to which the sequence of overwrites amounts.
    """
    stored = torch.eye(num_clients, dtype=torch.float64)
    for c in range(num_clients):
        stored[c] = mixing_matrix(attention_of(stored), degree_C)[c] @ stored
    return stored


class Fellrec(Method):
    """FELLRec. Defaults are the paper's intent; `as_published` is what the released code does."""

    kind: Literal["fellrec"] = "fellrec"
    alpha: float = Field(default=0.7, gt=0)
    """Speed of the warm-up: larger listens earlier."""
    beta: float = Field(default=5.0, gt=0)
    """Length of the warm-up in rounds."""
    temperature: float = Field(default=0.05, gt=0)
    """Temperature of the softmax over losses."""
    similarity: Source = "update"
    """Cosine of the round's updates, or of the weights themselves (the published way)."""
    attention: Literal["affine", "softmax", "top_k"] = "affine"
    """`affine` is FELLRec's; `softmax` and `top_k` are ours, off by default. With C clients whose
    updates hardly agree (cosine near 0), `affine` leaves each an own weight of about 2 / (2 + w C),
    1/500 at 1,000: plain averaging. `softmax` leaves 1 / (1 + w) and `top_k` about 2 / (2 + w k),
    however many there are."""
    tau: float = Field(default=0.1, gt=0)
    """Temperature of softmax attention. Whose cosine is larger by tau ln C outweighs all others
    together: 0.1 tells a cosine of 0.5 from 0 among 1,000 clients, one of 0.1 wants 0.02."""
    k: int = Field(default=3, ge=1)
    """Neighbours of top_k attention."""
    standardise_losses: bool = False
    """Ours: divide the losses by their spread first, so that one client does not take the whole
    loss share at a temperature made for another loss."""
    as_published: bool = False
    """The released code's arithmetic: exponent e + 1/beta (a lost parenthesis), w used only where
    beta is not 1, clients overwritten in place one after the other, raw weights compared."""

    def compares(self) -> Collection[Source]:
        """One of the two; as published always the weights."""
        return ["raw"] if self.as_published else [self.similarity]

    def plan(self, meta: Meta) -> Plan:
        """Mixing matrix and learning degree of round t (methods 1.2; as published: 1.3)."""
        losses = meta.losses_C
        if self.standardise_losses and len(losses) > 1:
            losses = losses / losses.std(correction=0).clamp(min=1e-12) * self.temperature
        share = loss_share(losses, self.temperature)
        if self.as_published:
            return self._plan_as_published(meta, share)
        degree = learning_degree(share, self.alpha, meta.round / self.beta)
        attention = self._attend(cosine(meta.gram[self.similarity]))
        return Plan(mixing_matrix(attention, degree), {"learning_degree": degree})

    def _plan_as_published(self, meta: Meta, share: Tensor) -> Plan:
        degree = learning_degree(share, self.alpha, published_exponent(meta.round, self.beta))
        used = torch.ones_like(degree) if self.beta == 1 else degree
        gram = meta.gram["raw"]
        mixing = mixing_matrix_in_place(
            lambda stored: self._attend(cosine(stored @ gram @ stored.T)), used, len(meta.clients)
        )
        return Plan(mixing, {"learning_degree": degree})

    def _attend(self, similarity_CC: Tensor) -> Tensor:
        if self.attention == "softmax":
            return softmax_attention(similarity_CC, self.tau)
        if self.attention == "top_k":
            return top_k_attention(similarity_CC, self.k)
        return affine_attention(similarity_CC)


def published_exponent(round: int, beta: float) -> float:
    """e + 1/beta with the 0-based epoch e = t - 1, where (e + 1) / beta was meant."""
    return round - 1 + 1 / beta
