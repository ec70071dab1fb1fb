"""Slots: which client stands in which row of a bank, and at which of its pages.

Clients that take part are brought in from the committed rounds in one read, and stay as long as
there is room; whoever has not changed since is not read again. Whoever is through with its training
leaves its slot: a slot costs a gradient and two moments beside the values, and of a round's many
clients only a few train at a time. It must not know what the bank's rows are used for.

Shapes: S slots, s slots asked for, P parameters of one client.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from fellray.platform.bank import Bank, finite_rows, state_names
from fellray.platform.faults import committed
from fellray.platform.local import ANCHOR
from fellray.platform.manifest import Staged
from fellray.platform.own import ALIKE, Own
from fellray.platform.paging import Paging, State
from fellray.platform.rounds import EVERYONE, Rounds

KEPT = 256
"""Clients that stay in memory beyond those that are asked for."""

BYTES_PER_PARAMETER = 24
"""Of a client in memory, in fp32: adapters, AdamW's two moments, the gradient, the round's start, a
copy to send."""

WRITTEN = 256
"""Clients in one file: writing one takes a few copies of what it holds."""


class Slots:
    """The rows of a bank as a cache of committed pages. `bank` is replaced when it grows."""

    def __init__(
        self,
        make: Callable[[int], Bank],
        part: str,
        moments: bool,
        rounds: Rounds,
        own: Own = ALIKE,
        kept: int | None = None,
    ):
        """Args: make: a bank of so many slots. part: `client` or `trunk`, names the pages. own:
        whose rows have a rank or a cut of their own. kept: clients that stay in memory, `KEPT` by
        default."""
        self.bank = make(0)
        self._own = own
        self._kept = KEPT if kept is None else kept
        self._make = make
        self._part = part
        self._moments = moments
        self._rule = self.bank.rule
        self._names = state_names(part, moments, self._rule)
        self._rounds = rounds
        self._paging = Paging(rounds, self._names)
        self._slot: dict[str, int] = {}
        """Longest unused first."""
        self._state: dict[str, State] = {}
        """Missing: the row is being trained, or was left half trained."""
        self.loaded = 0
        """Clients that `hold` had to read so far."""
        self._trained: dict[str, dict[str, Tensor]] = {}
        """What became of those who left their slots, by kind; on the CPU."""
        self._twins: dict[str, Tensor | None] = {}
        """What became of their anchors; None: these are being trained."""

    def fetch(self, round: int, clients: Sequence[str]) -> None:
        """Begin to read what `hold` will want next, while others train.

        Raises:
            StaleLease: as `committed`.
        """
        if clients:
            self._paging.fetch(round, self._find_stale(round, clients))

    def hold(self, round: int, clients: Sequence[str]) -> Tensor:
        """The slots [s] of distinct clients, each at its state of a round.

        Raises:
            StaleLease: as `committed`.
            Damaged: a page is not what was written; the driver decides.
            FellrayError: as `Rounds.load`.
        """
        if not clients:
            return torch.empty(0, dtype=torch.int64)
        stale = self._find_stale(round, clients)
        new = [c for c in clients if c not in self._slot]
        self._make_room(clients)
        try:
            for few, loaded in self._paging.read(round, stale):
                self.bank.reset(self.find([*few]), self._plain(loaded))
                self._state |= few
                self.loaded += len(few)
        except BaseException:
            for client in new:
                if client not in self._state:  # without one it would never leave
                    del self._slot[client]
            raise
        return self.find(clients)

    def find(self, clients: Sequence[str]) -> Tensor:
        """The slots [s] of clients that are held, whatever their rows are now."""
        return torch.tensor([self._slot[c] for c in clients], dtype=torch.int64)

    def train(self, clients: Sequence[str], twin: bool = False) -> None:
        """Their rows are no page's from now on.

        Args:
            twin: their anchors train first; `finish`, `hold` and `train` follow for the values.
        """
        for client in clients:
            self._state.pop(client, None)
            self._trained.pop(client, None)
            if twin:
                self._twins[client] = None
        self.bank.begin(self.find(clients), twin)

    def have_twins(self, clients: Collection[str]) -> bool:
        """Whether the anchors of all of them were trained, and what they came to is here."""
        return all(self._twins.get(c) is not None for c in clients)

    def finish(self, clients: Sequence[str]) -> None:
        """They are through with a round's training and leave their slots; again, nothing happens.

        What they came to is kept until `stage`, `release` or `clear`.
        """
        clients = [c for c in clients if c not in self._trained]
        slots = self.find(clients)
        self.bank.end(slots)
        state = self.bank.state(slots, self._moments)
        state = {kind: tensor.cpu() for kind, tensor in state.items()}
        for row, client in enumerate(clients):
            del self._slot[client]
            if client in self._twins and self._twins[client] is None:
                self._twins[client] = state["values"][row]
                continue
            self._trained[client] = {kind: tensor[row] for kind, tensor in state.items()}
            twin = self._twins.pop(client, None)
            if twin is not None:
                self._trained[client][ANCHOR] = twin

    def have_finished(self, clients: Collection[str]) -> bool:
        """Whether all of them did, and what they came to is here."""
        return all(c in self._trained for c in clients)

    def values(self, clients: Sequence[str]) -> Tensor:
        """The values [s, P] of clients who train or have finished, as they stand; on the CPU."""
        rows = [
            self._trained[c]["values"]
            if c in self._trained
            else self.bank.values_SP[self._slot[c]].cpu()
            for c in clients
        ]
        return torch.stack(rows) if rows else torch.empty(0, self.bank.values_SP.shape[1])

    def report(self, clients: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """What clients who train or have finished give to the mixture [s, P], on the CPU; and whose
        round is finite."""
        values_sP = self.values(clients)
        finite = finite_rows(values_sP)
        if self._rule.sent == "values" or not clients:
            return values_sP, finite
        sent_sP = torch.stack([self._trained[c][self._rule.sent] for c in clients])
        return sent_sP, [a and b for a, b in zip(finite, finite_rows(sent_sP), strict=True)]

    def replace(
        self, clients: Sequence[str], given_sP: Tensor, columns_p: Tensor | None = None
    ) -> None:
        """What those who finished are given, held as it lies: the mixture, and whatever else the
        rule says that a client receives, one beside the other.

        Args:
            columns_p: those of a client's row that are given; the others stay.
        """
        kinds = self._rule.received
        for client, given in zip(clients, given_sP, strict=True):
            held = self._trained[client]
            for kind, part in zip(kinds, given.tensor_split(len(kinds)), strict=True):
                held[kind] = (
                    part if columns_p is None else held[kind].index_copy(0, columns_p, part)
                )

    def stage(
        self, round: int, holder: str, clients: Sequence[str], values: bool
    ) -> tuple[Staged, ...]:
        """Write what clients came to as their pages of a round; they `finish` with that.

        As many as there is room for have slots again, and these pages in them. Where nothing is
        their own nothing is written.

        Args:
            values: False where everyone's page holds what the clients received and only the rest
                is their own.

        Returns:
            The files; none where there is nothing to write.
        """
        staged: list[Staged] = []
        if not self._written(values):
            return ()
        self.finish(clients)
        kept = frozenset(clients[:KEPT])
        writing: Future[tuple[Staged, ...]] | None = None
        for name, few in _deal(holder, clients):
            rows = [self._trained.pop(c) for c in few]
            state = {kind: torch.stack([row[kind] for row in rows]) for kind in rows[0]}
            del rows  # as many bytes again
            if writing:  # one file at a time, or as many bytes again for each
                staged += writing.result()
            write = partial(self._write, round, name, few, state, values)
            writing = self._paging.write(write)
            here = [c for c in few if c in kept]
            self._make_room(here)
            self.bank.reset(self.find(here), {k: t[: len(here)] for k, t in state.items()})
            self._state |= {c: (round,) * len(self._names) for c in here}
        if writing:
            staged += writing.result()
        return tuple(staged)

    def stage_start(self, seeded_P: Tensor) -> tuple[Staged, ...]:
        """Write round 0: the page of all who have none of their own."""
        self.clear()
        bank, one = self._make(1), torch.tensor([0])
        bank.reset(one, {"values": seeded_P[None], ANCHOR: seeded_P[None]})
        state = bank.state(one, self._moments)
        return self._write(0, f"start-{self._part}", (EVERYONE,), state, True)

    def release(self) -> None:
        """Free the rows that are no page's: nobody trains any more."""
        self._trained.clear()
        self._twins.clear()
        self._slot = {c: slot for c, slot in self._slot.items() if c in self._state}

    def clear(self) -> None:
        """Forget what the rows are; they stay where they lie."""
        self._slot.clear()
        self._state.clear()
        self._trained.clear()
        self._twins.clear()
        self._paging.forget()
        self._rounds.look_again()

    def _find_stale(self, round: int, clients: Sequence[str]) -> dict[str, State]:
        """Whose row is not its state of a round, and which that is."""
        with committed(self._rounds, round):
            at = [self._rounds.page_rounds(round, clients, name) for name in self._names]
        pairs = zip(clients, zip(*at, strict=True), strict=True)
        return {client: state for client, state in pairs if self._state.get(client) != state}

    def _write(
        self,
        round: int,
        holder: str,
        clients: Sequence[str],
        state: Mapping[str, Tensor],
        values: bool,
    ) -> tuple[Staged, ...]:
        names = self._written(values)
        if not clients or not names:
            return ()
        tensors = {name: state[name.removeprefix(f"{self._part}.")] for name in names}
        return (self._rounds.stage(round, holder, clients, tensors),)

    def _written(self, received: bool) -> list[str]:
        """Names of a client's own pages: with what it received, or without."""
        given = {f"{self._part}.{kind}" for kind in self._rule.received}
        return [name for name in self._names if received or name not in given]

    def _plain(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix(f"{self._part}."): t for name, t in tensors.items()}

    def _make_room(self, clients: Sequence[str]) -> None:
        for client in clients:  # used now: last to leave
            if client in self._slot:
                self._slot[client] = self._slot.pop(client)
        new = [c for c in clients if c not in self._slot]
        if not new:
            return
        rows = len(self.bank.values_SP)
        free = sorted(set(range(rows)) - set(self._slot.values()))
        if len(self._slot) + len(new) > self._kept:
            asked = set(clients)
            leaving = [c for c in self._slot if c in self._state and c not in asked]
            for client in leaving[: max(0, len(new) - len(free))]:
                free.append(self._slot.pop(client))
                del self._state[client]
        if len(new) > len(free):
            # by half as much again: growing wave by wave copies what is there only now and then
            grown = max(rows + len(new) - len(free), min(rows + rows // 2, self._kept))
            free += range(rows, grown)
            self._grow(grown)
        self._slot |= dict(zip(new, free, strict=False))
        if self._own.ranks:
            self.bank.set_ranks(self.find(new), self._own.ranks_of(new, self.bank.spec.r))
        if self._own.cuts:
            self.bank.set_cuts(self.find(new), self._own.cuts_of(new))

    def _grow(self, rows: int) -> None:
        old, self.bank = self.bank, self._make(rows)
        held = torch.arange(len(old.values_SP))
        self.bank.set_ranks(held, old.ranks_S.tolist())
        self.bank.set_cuts(held, old.cuts_S.tolist())
        self.bank.reset(held, old.state(held, True))
        self.bank.follow(old)


def _deal(holder: str, clients: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """A name and the clients of each file."""
    return [
        (f"{holder}-{at // WRITTEN}" if at else holder, clients[at : at + WRITTEN])
        for at in range(0, len(clients), WRITTEN)
    ]
