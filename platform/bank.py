"""The bank: adapters of many clients, stacked, gathered per row, each with an optimizer of its own.

With one client a bank computes what peft computes with `torch.optim.AdamW`. It must not know which
client has which slot, nor what becomes of its rows.

Shapes: S slots (clients), s slots asked for, N rows of a step, P parameters of one client, r rank.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
"""Numbers of a step that are worked on at a time: AdamW passes over them often, so they are to stay
in a core's cache."""


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
        rows = len(self._stepped) + len(self._references()) + 2
        self._scratch = torch.empty(rows if train else 0, CACHED, device=device)
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

        Bit-equal to `torch.optim.AdamW(foreach=False)` on each slot alone, where the rule corrects
        nothing.
        """
        c = self._train
        assert c is not None, "nobody trains"
        if self.rule.freezes_a:
            self.gradient.drop_a(slots_s)
        self.steps_S[slots_s] += 1
        steps = self.steps_S[slots_s].tolist()
        size_s = self.values_SP.new_tensor([c.learning_rate / (1 - c.beta1**t) for t in steps])
        correction_s = self.values_SP.new_tensor([math.sqrt(1 - c.beta2**t) for t in steps])
        clip_s = self._clip(slots_s, c.clip) if c.clip is not None and steps else None
        for rank, places in self._by_rank(slots_s):
            for part in zip(*self._part(rank), strict=True):
                at_once = max(1, CACHED // max(1, part[0][:1].numel()))
                for few in places.split(at_once):
                    clip = None if clip_s is None else clip_s[few]
                    self._step(part, slots_s[few], size_s[few], correction_s[few], clip)

    def _references(self) -> list[Tensor]:
        """What a step's correction is computed from."""
        if self.rule.controls:
            return [self.beside[CONTROL], self.beside[SERVER_CONTROL]]
        if self.rule.pull:
            return [self.beside[ANCHOR] if self.rule.anchored else self._start_SP]
        return []

    def _by_rank(self, slots_s: Tensor) -> list[tuple[int, Tensor]]:
        """Ranks, and where in `slots_s` those of it stand."""
        if not self._mixed:
            return [(self.spec.r, torch.arange(len(slots_s), device=slots_s.device))]
        ranks_s = self.ranks_S[slots_s]
        return [(r, (ranks_s == r).nonzero().squeeze(1)) for r in ranks_s.unique().tolist()]

    def _part(self, rank: int) -> list[list[Tensor]]:
        """What a step changes and looks at, of all slots, as many parts of each: what a rank has
        of it and what trains, views of `CACHED` numbers of a slot at most."""
        held = (*self._stepped, *self._references())
        if rank == self.spec.r and not self.rule.freezes_a:
            return [list(rows_SP.split(CACHED, 1)) for rows_SP in held]
        return [
            [
                few
                for a, b in views(rows_SP, self._sites, self.spec.r)
                for part in (a[:, :rank], b[:, :, :rank])[int(self.rule.freezes_a) :]
                for few in part.split(max(1, CACHED // part.shape[2]), 1)
            ]
            for rows_SP in held
        ]

    def _clip(self, slots_s: Tensor, clip: float) -> Tensor:
        """What each slot's gradient is multiplied by [s]."""
        norms = torch.stack([self.gradient.total_SP[slot].norm() for slot in slots_s.tolist()])
        return (clip / (norms + 1e-6)).clamp(max=1.0)

    def _step(
        self,
        part: Sequence[Tensor],
        slots_s: Tensor,
        size_s: Tensor,
        correction_s: Tensor,
        clip_s: Tensor | None,
    ) -> None:
        """A step of one part of a few slots."""
        c, at = self._train, _place(slots_s)
        assert c is not None
        in_place = isinstance(at, slice) and part[0][:1].is_contiguous()
        shape = (len(slots_s), *part[0].shape[1:])
        taken = [self._scratch[i, : math.prod(shape)].view(shape) for i in range(len(part) + 2)]
        if in_place:
            taken[: len(part)] = [rows[at] for rows in part]
        else:
            for rows, own in zip(part, taken, strict=False):
                torch.index_select(rows, 0, slots_s, out=own)
        flat = [t.flatten(1) for t in taken]
        values, gradient, change, denominator = *flat[:2], *flat[-2:]
        if clip_s is not None:
            gradient.mul_(clip_s[:, None])
        self._correct(slots_s, values, gradient, flat[len(self._stepped) : -2], change)
        values.mul_(1 - c.learning_rate * c.weight_decay)
        if c.optimizer == "sgd":
            values += torch.mul(gradient, -c.learning_rate, out=change)
        else:
            moment1, moment2 = flat[2:4]
            moment1.lerp_(gradient, 1 - c.beta1)
            moment2.mul_(c.beta2).addcmul_(gradient, gradient, value=1 - c.beta2)
            torch.sqrt(moment2, out=denominator).div_(correction_s[:, None]).add_(c.eps)
            values += torch.mul(moment1, -size_s[:, None], out=change).div_(denominator)
        gradient.zero_()
        if not in_place:
            for rows, own in zip(part[: len(self._stepped)], taken, strict=False):
                rows.index_copy_(0, slots_s, own)

    def _correct(
        self,
        slots_s: Tensor,
        values: Tensor,
        gradient: Tensor,
        references: Sequence[Tensor],
        change: Tensor,
    ) -> None:
        """Add to the loss's gradient what the rule says; `change` is free."""
        if self.rule.controls:
            control, server_control = references
            gradient.sub_(control).add_(server_control)
        elif references:
            torch.sub(values, references[0], out=change).mul_(self._pull_S[slots_s, None])
            gradient.add_(change)

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
