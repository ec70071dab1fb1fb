"""The one law of aggregation: a method plans a mixing matrix, `reduce` applies it.

A round ends, for each sent block b, with ``theta_b[r] <- sum_c M_b[r, c] * theta_b[c]``, rows of
M_b summing to one; one matrix is for all blocks that have none of their own. A method is its
`plan`: a pure function of what is known about the round. Nothing here knows where a client runs, or
in which order clients answered: they are sorted by id before they get here. How products of large
stacks are taken is `slabs`' business.

Shapes: C clients, P parameters of one client, R rows of a mixture that differ.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fellray.platform.local import PLAIN, LocalRule
from fellray.platform.model_config import AdapterLevels
from fellray.platform.section import Section
from fellray.platform.server_step import ServerStep
from fellray.platform.slabs import Stack, gram, mix

Source = Literal["update", "raw", "product"]
"""What the similarity of two clients is computed from: what the round changed, the weights sent, or
the products B A that they make."""

Weighting = Literal["uniform", "samples"]
"""How clients count in a mean: all the same, or by the histories they read."""

NO_BLOCKS: Mapping[str, slice] = MappingProxyType({})


@dataclass(frozen=True)
class Meta:
    """What a method may look at: facts and inner products, never one client's tensors."""

    round: int
    """t = 1, 2, ..."""
    clients: tuple[str, ...]
    """Those whose round was accepted, sorted."""
    losses_C: Tensor
    """Mean local training loss of the round, fp64."""
    samples_C: Tensor
    """Training histories read in the round, fp64."""
    gram: Mapping[Source, Tensor]
    """Inner products [C, C], fp64: of the updates (`update`), of the sent weights (`raw`), of the
    products of their factors (`product`); those that the method compares."""
    blocks: tuple[str, ...] = ()
    """What a row of sent weights consists of, in its order: on a language model one site's factor
    each, named as peft names it (``encoder.layer.0.attention.self.query.lora_A``)."""
    layers: Mapping[str, Mapping[Source, Tensor]] = field(default_factory=dict)
    """Layer -> its part of `gram`; empty where the method does not compare layers. A layer is an
    adapted projection with the name that its blocks have in common."""
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    """Attribute -> in which of its groups each client is [C], int64; empty where none are known."""


@dataclass(frozen=True)
class Reports:
    """What all learners sent at the end of a round."""

    meta: Meta
    """Of those whose round was accepted."""
    theta_CP: Tensor
    """Their sent weights, rows in the order of `meta.clients`; no columns where nothing is shared,
    and zeros in blocks that stay with their clients."""
    refused: Mapping[str, str]
    """Learners that keep the state of the round's start, and why."""
    losses: Mapping[str, float]
    """Every learner's mean training loss; those of refused learners may not be finite."""
    samples: int
    seconds: float
    """Wall time of local training."""
    late: tuple[str, ...] = ()
    """Asked, but not counted: their answers came after the deadline, or after enough others."""
    blocks: Mapping[str, slice] = field(default_factory=dict)
    """Block -> its columns of `theta_CP`: in their order, without a gap."""


@dataclass(frozen=True)
class Mixture:
    """Who listens to whom in one block."""

    mixing_CC: Tensor
    """As `Plan.mixing_CC`. The identity: the block stays its client's own. Blocks that are mixed
    alike better share one tensor: neighbours are then mixed in one product."""
    common: bool = False
    """As `Plan.common`."""
    within: str = ""
    """An attribute of `Meta.groups` in whose groups all rows are equal: they are meant for every
    member, also for who did not take part. Empty: each row is for its client alone."""


@dataclass(frozen=True)
class Plan:
    """Who listens to whom."""

    mixing_CC: Tensor
    """Row r: what recipient r takes of each client; rows sum to one. fp64."""
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    """Per client [C], for the record only (a learning degree, say)."""
    common: bool = False
    """All rows are equal and meant for everyone: also those who did not take part start their next
    round from it. Otherwise they keep what they have."""
    blocks: Mapping[str, Mixture] = field(default_factory=dict)
    """Blocks that are mixed otherwise; `mixing_CC` and `common` hold for all others."""
    step: ServerStep | None = None
    """What the server makes of the round's start and the mixture; None: the mixture it is."""

    @property
    def own_weight_C(self) -> Tensor:
        """What each client keeps of itself."""
        return self.mixing_CC.diagonal()


class Method(Section):
    """A federated method: its settings, which clients train together, and its plan."""

    def seat(self, clients: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Whose data trains under which adapters: learner -> the clients whose shards it reads.

        A federated method gives every client a seat of its own.
        """
        return {client: (client,) for client in clients}

    def compares(self) -> Collection[Source]:
        """The inner products that `plan` looks at; each costs about half of what mixing costs."""
        return ("update", "raw")

    def reads_losses(self) -> bool:
        """Whether `plan` looks at the losses. Where clients do not send them, they are NaN."""
        return True

    def local(self) -> LocalRule:
        """How clients train in a round: plainly, unless the method says otherwise."""
        return PLAIN

    def compares_layers(self) -> bool:
        """Whether `plan` looks at `Meta.layers`: a matrix [C, C] more for each of them."""
        return False

    def begins_alike(self) -> bool:
        """Whether all clients share one start, or draw one each."""
        return True

    def mixes_products(self) -> bool:
        """Whether A and B are looked at together, so that clients need one rank."""
        return False

    def levels(self) -> AdapterLevels | None:
        """Where a projection has a user's adapter and a group's; None: it has one."""
        return None

    def moves_base(self) -> bool:
        """Whether the plan's step keeps residuals of frozen weights (`server_step.RESIDUAL`)."""
        return False

    def sends(self, block: str) -> bool:
        """Whether clients send this block of the layers that they hold, and receive it.

        One that they do not stands as zeros in `Reports.theta_CP`, and `plan` has to give it the
        identity: it is its client's alone. Or it is frozen and stands there as everybody has it.
        """
        return True

    def plan(self, meta: Meta) -> Plan:
        """The mixing matrix of this round."""
        raise NotImplementedError


def describe(
    round: int,
    clients: Sequence[str],
    losses: Sequence[float],
    samples: Sequence[int],
    theta_CP: Stack,
    start_CP: Stack,
    sources: Collection[Source] = ("update", "raw"),
    blocks: Mapping[str, slice] = NO_BLOCKS,
    groups: Mapping[str, Tensor] | None = None,
    by_layer: bool = False,
    rank: int = 0,
) -> Meta:
    """What a plan may look at, from one snapshot of everybody's sent weights.

    Args:
        round: t = 1, 2, ...
        clients: sorted ids, one per row.
        losses: each client's mean local training loss.
        samples: how many histories each client read.
        theta_CP: sent weights after local training.
        start_CP: the same weights at the start of the round.
        sources: what inner products are taken of: what the method compares.
        blocks: what the rows consist of, in their order, and its columns.
        groups: attribute -> in which of its groups each client is.
        by_layer: whether inner products are also kept layer by layer; the stacks then lie in
            memory.
        rank: of all adapters, where `product` is compared; the stacks then lie in memory.
    """
    assert list(clients) == sorted(clients), "rows follow the sorted client ids"
    layers = name_layers(blocks) if by_layer or "product" in sources else {}

    def measure(source: Source, layer: str) -> Tensor:
        if source == "product":
            a, b = (blocks[f"{layer}.{factor}"] for factor in ("lora_A", "lora_B"))
            return product_gram(_in_memory(theta_CP)[:, a], _in_memory(theta_CP)[:, b], rank)
        columns = layers[layer]
        start_Cp = _in_memory(start_CP)[:, columns] if source == "update" else None
        return gram(_in_memory(theta_CP)[:, columns], start_Cp)

    products: dict[Source, Tensor] = {}
    of_layer: dict[str, dict[Source, Tensor]] = {layer: {} for layer in layers if by_layer}
    for source in sources:
        if not by_layer and source != "product":
            products[source] = gram(theta_CP, start_CP if source == "update" else None)
            continue
        parts = {layer: measure(source, layer) for layer in layers}
        for layer, own in of_layer.items():
            own[source] = parts[layer]
        none_CC = torch.zeros(len(clients), len(clients), dtype=torch.float64)
        products[source] = torch.stack(list(parts.values())).sum(0) if parts else none_CC
    return Meta(
        round=round,
        clients=tuple(clients),
        losses_C=torch.tensor(losses, dtype=torch.float64),
        samples_C=torch.tensor(samples, dtype=torch.float64),
        gram=products,
        blocks=tuple(blocks),
        layers=of_layer,
        groups=dict(groups or {}),
    )


def name_layers(blocks: Mapping[str, slice]) -> dict[str, slice]:
    """Neighbouring blocks of one projection as one: its name -> its columns."""
    layers: dict[str, slice] = {}
    for name, columns in blocks.items():
        layer = layer_of(name)
        first = layers.get(layer, columns)
        assert first.start == columns.start or first.stop == columns.start, f"{layer} is split"
        layers[layer] = slice(first.start, columns.stop)
    return layers


def layer_of(block: str) -> str:
    """The projection that a block belongs to."""
    return block.removesuffix(".lora_A").removesuffix(".lora_B")


def mean_row(meta: Meta, weighting: Weighting) -> Tensor:
    """What each client counts in the mean [C], fp64."""
    weights_C = meta.samples_C if weighting == "samples" else torch.ones_like(meta.samples_C)
    return weights_C / weights_C.sum()


def reduce(plan: Plan, theta_CP: Tensor, blocks: Mapping[str, slice] = NO_BLOCKS) -> Tensor:
    """``M_b @ theta_b`` for every block [C, P] in theta's dtype, from one snapshot that stays as it
    is.

    Equal rows of a matrix give equal bits, and a row that listens to nobody else returns its own
    weights bit for bit. Sums are taken in fp64 for up to `slabs.EXACT` clients, in fp32 for more.
    Where the plan has one row for everyone the rows are one in memory, and not to be written to.

    Args:
        blocks: see `Reports.blocks`; needed where the plan mixes some otherwise.

    Raises:
        ValueError: as `split_columns`.
    """
    num_clients, num_parameters = theta_CP.shape
    parts = split_columns(plan, blocks, num_parameters)
    differ = min(1, num_clients) if all(part.common for part, _ in parts) else num_clients
    mixed_RP = theta_CP.new_empty(differ, num_parameters)
    for part, columns in parts:
        mix(part.mixing_CC, theta_CP, mixed_RP, columns=columns)
    return mixed_RP.expand(num_clients, num_parameters)


def reduce_(plan: Plan, theta_CP: Stack, blocks: Mapping[str, slice] = NO_BLOCKS) -> None:
    """`reduce`, the same bits, into the snapshot's own place: a few slabs of memory more.

    When it is interrupted the stack is part snapshot, part mixture, and has to be made again.

    Raises:
        ValueError: as `split_columns`; nothing was written.
    """
    for part, columns in split_columns(plan, blocks, theta_CP.shape[1]):
        mix(part.mixing_CC, theta_CP, theta_CP, columns=columns)


def split_columns(
    plan: Plan, blocks: Mapping[str, slice], num_parameters: int
) -> list[tuple[Mixture, slice]]:
    """What is mixed how: runs of columns from the first to the last, each as long as one matrix
    goes.

    Raises:
        ValueError: a row of a matrix does not sum to one, or the plan names a block that is not
            sent.
    """
    rest = Mixture(plan.mixing_CC, plan.common)
    check_rows(rest.mixing_CC)
    if not plan.blocks:
        return [(rest, slice(0, num_parameters))]
    if unknown := [name for name in plan.blocks if name not in blocks]:
        raise ValueError(
            f"the plan mixes block {unknown[0]!r}, which is not sent; there are {len(blocks)}: "
            f"{', '.join(list(blocks)[:4])} ..."
        )
    for mixing_CC in {id(part.mixing_CC): part.mixing_CC for part in plan.blocks.values()}.values():
        check_rows(mixing_CC)
    parts: list[tuple[Mixture, slice]] = []
    at = 0
    for name, columns in blocks.items():
        assert columns.start == at, f"block {name} begins at {columns.start}, not at {at}"
        at = columns.stop
        part = plan.blocks.get(name, rest)
        last = parts[-1] if parts else None
        if last and last[0].mixing_CC is part.mixing_CC and _alike(last[0], part):
            parts[-1] = (part, slice(last[1].start, at))
        else:
            parts.append((part, columns))
    assert at == num_parameters, f"the blocks have {at} columns, the rows {num_parameters}"
    return parts


def _alike(one: Mixture, other: Mixture) -> bool:
    return (one.common, one.within) == (other.common, other.within)


def check_rows(mixing_CC: Tensor) -> None:
    """See that the weights of every recipient sum to one, in fp64 and before they are rounded.

    Raises:
        ValueError: a row does not.
    """
    sum_C = mixing_CC.double().sum(1)
    off_C = ~((sum_C - 1).abs() <= 1e-6)
    if off_C.any():
        first = int(off_C.nonzero()[0])
        raise ValueError(
            f"row {first} of the mixing matrix sums to {sum_C[first].item()}, not to one; "
            f"{int(off_C.sum())} of {len(sum_C)} rows are off"
        )


def product_gram(a_Ca: Tensor, b_Cb: Tensor, rank: int) -> Tensor:
    """Inner products [C, C], fp64, of every client's ``B A``, which is never made.

    ``<B A, B' A'> = sum of (B^T B') * (A A'^T)``, so two matrices [C r, C r] are enough.

    Args:
        a_Ca: each client's A [r, d_in], flat.
        b_Cb: its B [d_out, r], flat.
        rank: r.
    """
    num_clients = len(a_Ca)
    rows_a = a_Ca.double().reshape(num_clients * rank, -1)
    rows_b = b_Cb.double().unflatten(1, (-1, rank)).transpose(1, 2).flatten(0, 1)
    joint = (rows_a @ rows_a.T).mul_(rows_b @ rows_b.T)
    return joint.view(num_clients, rank, num_clients, rank).sum((1, 3))


def _in_memory(stack: Stack) -> Tensor:
    assert isinstance(stack, Tensor), "by layer, and products, only in memory"
    return stack


def centre(gram_CC: Tensor) -> Tensor:
    """Inner products [C, C] of what is left of the vectors without their mean."""
    row_C = gram_CC.mean(1)
    return gram_CC - row_C[:, None] - row_C[None, :] + row_C.mean()


def cosine(gram_CC: Tensor) -> Tensor:
    """Cosine similarities [C, C] from inner products; 0 with a zero vector, 1 on the diagonal."""
    norm_C = gram_CC.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norm_C > 0, 1 / norm_C, torch.zeros_like(norm_C))
    similarity = gram_CC * scale[:, None]
    similarity *= scale[None, :]
    return similarity.clamp_(-1, 1).fill_diagonal_(1.0)
