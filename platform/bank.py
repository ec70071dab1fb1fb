"""The bank: adapters of many clients, stacked, gathered per row, each with an optimizer of its own.

With one client a bank computes what peft computes with `torch.optim.AdamW`. It must not know which
client has which slot, nor what becomes of its rows.

Shapes: S slots (clients), s slots asked for, N rows of a step, P parameters of one client, r rank.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fellray.platform.adapters import Pair, Site, cut_, rescale, views
from fellray.platform.gradient_sum import GradientSum
from fellray.platform.local import (
    ANCHOR,
    CONTROL,
    PLAIN,
    SERVER_CONTROL,
    LocalRule,
    advance_control,
)
from fellray.platform.model_config import LoraSpec
from fellray.platform.train_config import TrainConfig

CACHED = 2**17
"""Numbers that are copied to be worked on at a time, so that they stay in a core's cache."""


class Bank:
    """The adapters of S clients for one part of the model, and one AdamW state for each, or none
    under SGD; and what the method's rule of local training keeps beside them.

    Where nobody trains a bank holds the values alone, a quarter of that.

    What is behind a slot's own rank is zero and stays so: with A's row and B's column zero, either
    gradient has the other as a factor, so values and moments take steps of exactly zero. So is what
    a client of its cut has on the other side: no row of it passes there.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        spec: LoraSpec,
        train: TrainConfig | None,
        num_slots: int,
        device: torch.device | None = None,
        rule: LocalRule = PLAIN,
    ):
        """Args: spec: `r` is the largest rank, and every slot's until `set_ranks`. train: None:
        nobody trains. rule: how local training goes."""
        self._train = train
        self.rule = rule if train else PLAIN
        self._sites = sites
        self.spec = spec
        self.ranks_S = torch.full((num_slots,), spec.r, device=device)
        self._mixed = False
        self.cuts_S = torch.full_like(self.ranks_S, -1)
        """Where cuts differ: each slot's; -1: a row that is nobody's and whole."""
        size = sum(site.num_parameters(spec.r) for site in sites)
        trained = num_slots if train else 0
        self.gradient = GradientSum(sites, spec.r, trained, device)
        self.values_SP = torch.zeros(num_slots, size, device=device)
        self._moves = train is not None and train.optimizer == "adamw"
        moving = trained if self._moves else 0
        self.moment1_SP = torch.zeros(moving, size, device=device)
        self.moment2_SP = torch.zeros(moving, size, device=device)
        self.steps_S = torch.zeros(trained, dtype=torch.int64, device=device)
        self.beside = {kind: torch.zeros(trained, size, device=device) for kind in self.rule.kinds}
        """What the rule keeps [S, P], by kind."""
        began = trained if self.rule.remembers_start else 0
        self._start_SP = torch.zeros(began, size, device=device)
        """The values at the start of a round's training."""
        self._pull_S = torch.zeros(trained, device=device)
        """How strongly each slot is pulled in the training under way."""
        self._values = views(self.values_SP, sites, spec.r)
        self._weights = [self._values] + [views(t, sites, spec.r) for t in self.beside.values()]
        """Of everything that has a rank and a side."""
        self._stepped = [self.values_SP, self.gradient.total_SP]
        """What a step changes."""
        if self._moves:
            self._stepped += [self.moment1_SP, self.moment2_SP]
        largest = max((site.num_parameters(spec.r) for site in sites), default=0)
        scratch = max(CACHED, largest) if train else 0
        self._scratch = torch.empty(len(self._stepped), scratch, device=device)
        """A step's memory, made once: fresh pages cost more than the arithmetic on them."""

    def set_ranks(self, slots_s: Tensor, ranks: Sequence[int]) -> None:
        """Give slots ranks of their own, before anything else is put there."""
        assert all(1 <= rank <= self.spec.r for rank in ranks), ranks
        self.ranks_S[slots_s] = self.ranks_S.new_tensor(ranks)
        self._mixed = self._mixed or any(rank != self.spec.r for rank in ranks)

    def set_cuts(self, slots_s: Tensor, cuts: Sequence[int]) -> None:
        """Give slots cuts of their own, before anything else is put there."""
        self.cuts_S[slots_s] = self.cuts_S.new_tensor(cuts)

    def gather(self, slots_N: Tensor, train: bool) -> list[Pair]:
        """Each row's own adapters, one pair per site; leaves that collect gradients if `train`."""
        return [
            (a[slots_N].requires_grad_(train), b[slots_N].requires_grad_(train))
            for a, b in self._values
        ]

    def scale(self, slots_N: Tensor, pairs: Sequence[Pair]) -> Sequence[Pair]:
        """Gathered adapters as `LoraLinear` takes them: see `rescale`."""
        return rescale(pairs, self.spec, self.ranks_S[slots_N].tolist()) if self._mixed else pairs

    def begin(self, slots_s: Tensor, twin: bool = False) -> None:
        """A round's training begins from where these slots stand.

        Args:
            twin: it is their anchors' training: they stand where the values were.
        """
        place, rule = _place(slots_s), self.rule
        if twin:
            self.values_SP[place] = self.beside[ANCHOR][place]
        if rule.pull and self._train:
            self._pull_S[place] = 0.0 if twin else rule.pull
        if rule.remembers_start:
            self._start_SP[place] = self.values_SP[place]

    def end(self, slots_s: Tensor) -> None:
        """A round's training of these slots is over: what is kept beside the values follows."""
        if not self.rule.controls:
            return
        assert self._train is not None
        place = _place(slots_s)
        self.beside[CONTROL][place] = advance_control(
            self.beside[CONTROL][place],
            self.beside[SERVER_CONTROL][place],
            self._start_SP[place],
            self.values_SP[place],
            self.steps_S[place],
            self._train.learning_rate,
        )

    def step(self, slots_s: Tensor) -> None:
        """One step of distinct slots only; nobody else changes by a bit.

        Bit-equal to `torch.optim.AdamW(fused=True)` on each slot alone, where the rule corrects
        nothing. Fused, because otherwise a step of many clients costs four times as much.
        """
        assert self._train is not None, "nobody trains"
        if self.rule.freezes_a:
            self.gradient.drop_a(slots_s)
        self._correct(slots_s)
        for rank, own_s in self._by_rank(slots_s):
            for part in zip(*self._part(rank), strict=True):
                self._step(part, own_s)
        self.steps_S[slots_s] += 1

    def _references(self) -> list[Tensor]:
        """What a step's correction is computed from."""
        if self.rule.controls:
            return [self.beside[CONTROL], self.beside[SERVER_CONTROL]]
        if self.rule.pull:
            return [self.beside[ANCHOR] if self.rule.anchored else self._start_SP]
        return []

    def _by_rank(self, slots_s: Tensor) -> list[tuple[int, Tensor]]:
        """Ranks, and the slots of each."""
        if not self._mixed:
            return [(self.spec.r, slots_s)]
        ranks_s = self.ranks_S[slots_s]
        return [(r, slots_s[ranks_s == r]) for r in ranks_s.unique().tolist()]

    def _part(self, rank: int) -> list[list[Tensor]]:
        """What a step changes, of all slots, as many parts of each: what a rank has of it and what
        trains."""
        if rank == self.spec.r and not self.rule.freezes_a:
            return [[rows_SP] for rows_SP in self._stepped]
        return [
            [
                part
                for a, b in views(rows_SP, self._sites, self.spec.r)
                for part in (a[:, :rank], b[:, :, :rank])[int(self.rule.freezes_a) :]
            ]
            for rows_SP in self._stepped
        ]

    def _step(self, part: Sequence[Tensor], slots_s: Tensor) -> None:
        """A step of one part of some slots; the gradient is zero after it."""
        if part[0][:1].is_contiguous():
            self._optimize([[rows[slot] for slot in slots_s.tolist()] for rows in part], slots_s)
            part[1][_place(slots_s)] = 0.0
            return
        for few in slots_s.split(max(1, CACHED // part[0][0].numel())):
            shape = (len(few), *part[0].shape[1:])
            taken = [
                torch.index_select(rows, 0, few, out=own[: math.prod(shape)].view(shape))
                for rows, own in zip(part, self._scratch, strict=True)
            ]
            self._optimize([list(own) for own in taken], few)
            taken[1].zero_()
            for rows, own in zip(part, taken, strict=True):
                rows.index_copy_(0, few, own)

    def _optimize(self, own: Sequence[list[Tensor]], slots_s: Tensor) -> None:
        """The optimizer's arithmetic on what a step changes, each slot's in one piece."""
        c = self._train
        assert c is not None
        if c.optimizer == "sgd":
            for value, gradient in zip(*own, strict=True):
                value.mul_(1 - c.learning_rate * c.weight_decay)
                value.add_(gradient, alpha=-c.learning_rate)
            return
        values, gradients, moments1, moments2 = own
        adamw(
            values,
            gradients,
            moments1,
            moments2,
            max_exp_avg_sqs=[],
            state_steps=list(self.steps_S[slots_s].float()),  # copies: each call counts on
            fused=True,
            amsgrad=False,
            beta1=c.beta1,
            beta2=c.beta2,
            lr=c.learning_rate,
            weight_decay=c.weight_decay,
            eps=c.eps,
            maximize=False,
        )

    def _correct(self, slots_s: Tensor) -> None:
        """Clip the loss's gradients, and add to them what the rule says."""
        c = self._train
        assert c is not None
        references = self._references()
        if not len(slots_s) or (c.clip is None and not references):
            return
        for few in slots_s.split(max(1, CACHED // max(1, self.values_SP.shape[1]))):
            place = _place(few)
            gradient = self.gradient.total_SP[place]
            if c.clip is not None:
                norms = torch.stack([row.norm() for row in gradient])
                gradient.mul_((c.clip / (norms + 1e-6)).clamp(max=1.0)[:, None])
            if self.rule.controls:
                control, server_control = references
                gradient.sub_(control[place]).add_(server_control[place])
            elif references:
                pull = self.values_SP[place] - references[0][place]
                gradient.add_(pull.mul_(self._pull_S[few, None]))
            self.gradient.total_SP[place] = gradient

    def state(self, slots_s: Tensor, moments: bool) -> dict[str, Tensor]:
        """Copies of the slots' rows: values, what the rule keeps, and AdamW's moments and step
        counts if asked."""
        tensors = {"values": self.values_SP, **self.beside}
        if moments:
            tensors = self._tensors()
        place = _place(slots_s)
        if isinstance(place, slice):
            return {name: tensor[place].clone() for name, tensor in tensors.items()}
        return {name: tensor[place] for name, tensor in tensors.items()}

    def reset(self, slots_s: Tensor, state: Mapping[str, Tensor]) -> None:
        """Put slots to the rows of a `state`, in their order, values cut to each slot's rank and
        side; what it does not hold starts anew."""
        place = _place(slots_s)
        if self._train:
            self.gradient.total_SP[place] = 0.0
        for name, tensor in self._tensors().items():
            tensor[place] = state[name].to(tensor.device) if name in state else tensor.new_zeros(())
        if self._mixed:
            slots = slots_s.to(self.ranks_S.device)
            for pairs in self._weights:
                cut_(pairs, slots, self.ranks_S[slots])
        for at, site in enumerate(self._sites):
            if site.cuts is not None:
                slots = slots_s.to(self.cuts_S.device)
                cuts_s = self.cuts_S[slots]
                here = (cuts_s >= site.cuts.start) & (cuts_s < site.cuts.stop)
                away = ~here & (cuts_s >= 0)
                for part in (part for pairs in self._weights for part in pairs[at]):
                    part[slots[away]] = 0.0

    def follow(self, other: "Bank") -> None:
        """Take over what a smaller bank knows of trainings under way, slot by slot."""
        for own, theirs in ((self._start_SP, other._start_SP), (self._pull_S, other._pull_S)):
            own[: len(theirs)] = theirs

    def _tensors(self) -> dict[str, Tensor]:
        held = {"values": self.values_SP, **self.beside}
        if self._moves:
            held |= {"moment1": self.moment1_SP, "moment2": self.moment2_SP}
        return held | {"steps": self.steps_S} if self._train else held


def state_names(part: str, moments: bool, rule: LocalRule = PLAIN) -> list[str]:
    """Names under which a bank's `state` is kept in a round."""
    kinds = ["values", *rule.kinds, *(["moment1", "moment2", "steps"] if moments else [])]
    return [f"{part}.{kind}" for kind in kinds]


def finite_rows(values_SP: Tensor) -> list[bool]:
    """Which rows hold neither a NaN nor an infinity."""
    # a finite sum says it sooner
    finite_S = values_SP.sum(1).isfinite()
    finite: list[bool] = (finite_S if finite_S.all() else values_SP.isfinite().all(1)).tolist()
    return finite


def _place(slots_s: Tensor) -> Tensor | slice:
    """Slots that follow one another as a slice: copied several times as fast as by index."""
    if slots_s.device.type != "cpu" or not len(slots_s):
        return slots_s
    first = int(slots_s[0])
    if not torch.equal(slots_s, torch.arange(first, first + len(slots_s))):
        return slots_s
    return slice(first, first + len(slots_s))
