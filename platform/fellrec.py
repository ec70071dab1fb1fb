"""FELLRec's dynamic balance: similarity decides whom a client listens to, its loss how far yet.

Zhao et al., "A Federated Framework for LLM-based Recommendation", Findings of NAACL 2025
(arXiv 2402.09959). The formulas are pure functions on fp64 tensors; `Fellrec.plan` composes them.

Shapes: C clients.
"""

from collections.abc import Callable, Collection
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
    centre,
    cosine,
    layer_of,
)

Defect = Literal["exponent", "unused_degree", "in_place", "raw_weights", "own_start", "tiny_losses"]
"""What the released code does otherwise than the paper means; docs/methods.md explains."""
PUBLISHED: frozenset[Defect] = frozenset(
    ["exponent", "unused_degree", "in_place", "raw_weights", "own_start"]
)
"""Those of the released language model (BIGRec); `tiny_losses` is of the other, RecFormer."""
AS_PUBLISHED = {"alpha": 0.7, "beta": 1.0, "temperature": 0.05}
"""What its script sets wherever `as_published` is given and nothing else is."""

PUBLISHED_SCALE = 2 / 16
"""Of the loss that RecFormer's training hands on: micro-batches of 2 in batches of 16."""


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
    """Cosine of the round's updates, of the weights themselves (`raw`, the published way), or of
    the products B A that they make (`product`, ours: two clients with one model are alike, however
    it is factored). Products need one rank for all clients."""
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
    centred: bool = False
    """Ours: compare what is left of the updates (or weights) without their mean. What all clients
    learn alike no longer makes everybody similar to everybody; two clients are then opposites."""
    per_layer: bool = False
    """Ours: every adapted projection has a matrix of its own, from its own similarities. The driver
    then holds two matrices [C, C] for each."""
    defects: tuple[Defect, ...] = ()
    """What the released code does otherwise, one at a time: `exponent` e + 1/beta (a lost
    parenthesis); `unused_degree`: w used only where beta is not 1; `in_place`: clients overwritten
    one after the other, later ones mixed from what the earlier ones became; `raw_weights` compared
    instead of updates; `own_start`: every client draws an A of its own instead of a common one;
    `tiny_losses`: an eighth of the loss, divided by the client's number of histories, so that all
    shares are equal (RecFormer; there of the last batch only)."""
    as_published: bool = False
    """All defects of the released language model, the first five, and the settings of its script:
    beta is 1 unless another is given, so that the learning degree is not used."""

    @model_validator(mode="before")
    @classmethod
    def _published(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("as_published") is True:
            return {**AS_PUBLISHED, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.per_layer and "in_place" in self._defects:
            raise ValueError(
                "method.per_layer has one matrix for each projection and the defect in_place one "
                "order of overwriting whole clients; set one of them"
            )
        return self

    @property
    def _defects(self) -> frozenset[Defect]:
        return PUBLISHED.union(self.defects) if self.as_published else frozenset(self.defects)

    @property
    def _source(self) -> Source:
        return "raw" if "raw_weights" in self._defects else self.similarity

    def compares(self) -> Collection[Source]:
        """One of the two; as published always the weights."""
        return [self._source]

    def mixes_products(self) -> bool:
        """Where products are compared."""
        return self._source == "product"

    def compares_layers(self) -> bool:
        """Where every projection has a matrix of its own."""
        return self.per_layer

    def begins_alike(self) -> bool:
        """All but the released code."""
        return "own_start" not in self._defects

    def plan(self, meta: Meta) -> Plan:
        """Mixing matrix and learning degree of round t (methods 1.2; as published: 1.3)."""
        defects, losses = self._defects, meta.losses_C
        if "tiny_losses" in defects:
            losses = losses * PUBLISHED_SCALE / meta.samples_C.clamp(min=1)
        if self.standardise_losses and len(losses) > 1:
            losses = losses / losses.std(correction=0).clamp(min=1e-12) * self.temperature
        share = loss_share(losses, self.temperature)
        published, intended = published_exponent(meta.round, self.beta), meta.round / self.beta
        exponent = published if "exponent" in defects else intended
        degree = learning_degree(share, self.alpha, exponent)
        unused = self.beta == 1 and "unused_degree" in defects
        used = torch.ones_like(degree) if unused else degree
        notes = {"learning_degree": degree}
        if not self.per_layer:
            return Plan(self._mix(meta.gram[self._source], used), notes)
        of_layer = {
            name: Mixture(self._mix(products[self._source], used))
            for name, products in meta.layers.items()
        }
        if not of_layer:  # nothing is sent
            return Plan(self._mix(meta.gram[self._source], used), notes)
        # of no block; the record has what clients keep of themselves on average
        mean_CC = torch.stack([mixture.mixing_CC for mixture in of_layer.values()]).mean(0)
        return Plan(mean_CC, notes, blocks={b: of_layer[layer_of(b)] for b in meta.blocks})

    def _mix(self, gram_CC: Tensor, degree_C: Tensor) -> Tensor:
        if self.centred:
            gram_CC = centre(gram_CC)
        if "in_place" not in self._defects:
            return mixing_matrix(self._attend(cosine(gram_CC)), degree_C)
        return mixing_matrix_in_place(
            lambda stored: self._attend(cosine(stored @ gram_CC @ stored.T)),
            degree_C,
            len(gram_CC),
        )

    def _attend(self, similarity_CC: Tensor) -> Tensor:
        if self.attention == "softmax":
            return softmax_attention(similarity_CC, self.tau)
        if self.attention == "top_k":
            return top_k_attention(similarity_CC, self.k)
        return affine_attention(similarity_CC)


def published_exponent(round: int, beta: float) -> float:
    """e + 1/beta with the 0-based epoch e = t - 1, where (e + 1) / beta was meant."""
    return round - 1 + 1 / beta
