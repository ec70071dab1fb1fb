"""Means of several learners' adapters, read as if each were one more client of the round.

A blend's name says whose mean it is, so both sides of the cut make the same one, each of its own
part. Where clients have cuts of their own, a blend has the largest: its client side then has every
block that any of them holds. It must not know why somebody is blended.

Shapes: P parameters of one client, p of them.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fellray.platform.adapters import Site, name_blocks
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.middle import Middle
from fellray.platform.own import ALIKE, Own
from fellray.platform.rounds import Rounds
from fellray.platform.storage import Storage

_MARK = "+"
"""No client's name begins with it."""
EVERYBODY = _MARK
"""The blend of all who trained up to a round, or the start where nobody did."""
CLIENT, TRUNK = "client.values", "trunk.values"
AT_ONCE = 64
"""Learners whose pages are read together."""


def name_blend(learners: Sequence[str]) -> str:
    """The name of the mean of these learners."""
    return "".join(_MARK + learner for learner in learners)


class Blends(Rounds):
    """The committed rounds of a run, with blends among the clients."""

    def __init__(
        self,
        storage: Storage,
        learners: Collection[str],
        own: Own = ALIKE,
        middle: Middle | None = None,
        private_p: Tensor | None = None,
    ):
        """Args: storage: the run's folder. learners: ids of everyone who trains. own: whose models
        are cut elsewhere. middle: the blocks between; who asks for clients' parts gives it, and
        `private_p`, the columns of these that a blend has zeros in."""
        super().__init__(storage)
        self._private_p = private_p
        self._own = own
        self._middle = middle
        self._everyone = sorted(learners)
        self._learners = frozenset(learners)

    def __contains__(self, name: object) -> bool:
        """Whether this is a learner, or a blend of learners."""
        return isinstance(name, str) and (
            name == EVERYBODY
            or name in self._learners
            or (name.startswith(_MARK) and self._learners.issuperset(_members(name)))
        )

    def trained(self, round: int, name: str) -> frozenset[str]:
        """Learners whose tensor of this name is not the start's any more."""
        at = super().page_rounds(round, self._everyone, name)
        return frozenset(c for c, page in zip(self._everyone, at, strict=True) if page > 0)

    def page_rounds(self, round: int, clients: Sequence[str], name: str) -> list[int]:
        """See `Rounds`; a blend is made anew for every round."""
        plain = iter(super().page_rounds(round, [c for c in clients if not _is_blend(c)], name))
        return [round if _is_blend(c) else next(plain) for c in clients]

    def load(
        self, round: int, clients: Sequence[str], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """See `Rounds`; a blend's tensor is the mean, summed in float64 in the order of ids."""
        if not any(map(_is_blend, clients)):
            return super().load(round, clients, names)
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for client in clients:
            one = self._blend(round, client, names) if _is_blend(client) else None
            for name in names:
                plain = one[name] if one else super().load(round, [client], [name])[name]
                rows[name].append(plain)
        return {name: torch.cat(tensors) for name, tensors in rows.items()}

    def _blend(self, round: int, name: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        members = sorted(_members(name) if name != EVERYBODY else self.trained(round, names[0]))
        if not members:
            return super().load(round, self._everyone[:1], names)
        if any(member not in self._learners for member in members):
            raise FellrayError(f"{name!r}: is no mean of clients of this run")
        sums: dict[str, torch.Tensor] = {}
        for at in range(0, len(members), AT_ONCE):
            few = members[at : at + AT_ONCE]
            loaded = super().load(round, few, names)
            if self._middle and self._own.cuts and CLIENT in names:
                held_SP = super().load(round, few, [TRUNK])[TRUNK]
                self._middle.fill_(loaded[CLIENT], held_SP, self._own.cuts_of(few))
            for key, rows in loaded.items():
                part = rows.double().sum(0, keepdim=True)
                sums[key] = sums[key] + part if key in sums else part
        means = {key: (total / len(members)).float() for key, total in sums.items()}
        if self._private_p is not None and CLIENT in means:
            means[CLIENT][:, self._private_p] = 0.0
        return means


def find_private(config: RunConfig, sites: Sequence[Site]) -> Tensor | None:
    """Columns of a client's part that answer nobody else's questions, where adapters have levels:
    a user's, and gates that are not sent. Zeros there are as if they were not; None: of none."""
    if not config.model.levels:
        return None
    blocks = name_blocks(sites, config.model.lora.r)
    spans = [
        torch.arange(columns.start, columns.stop)
        for name, columns in blocks.items()
        if not config.method.sends(name)
    ]
    return torch.cat(spans) if spans else None


def _is_blend(client: str) -> bool:
    return client.startswith(_MARK)


def _members(name: str) -> list[str]:
    return name.removeprefix(_MARK).split(_MARK)
