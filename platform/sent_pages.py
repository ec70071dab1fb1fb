"""Sent rows as pages of rounds: what they were at a committed round, and what a round puts down.

It must not know how rows are mixed, nor who holds what in memory.

Shapes: C learners, P sent parameters of one learner.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fellray.platform.adapters import start
from fellray.platform.config import RunConfig
from fellray.platform.manifest import Staged
from fellray.platform.rounds import EVERYONE, Rounds
from fellray.platform.seating import deal
from fellray.platform.sent_row import SentRow
from fellray.platform.slots import WRITTEN
from fellray.platform.split import Cut


class SentPages:
    """The sent rows of all learners of a run."""

    def __init__(self, config: RunConfig, cut: Cut, row: SentRow, rounds: Rounds):
        """Args: cut: of the run."""
        self._config, self._cut, self._row, self._rounds = config, cut, row, rounds
        self._rule = config.method.local()

    def load(self, round: int, clients: Sequence[str], kind: str | None = None) -> Tensor:
        """The clients' sent weights at a committed round [C, P], or what else is so long."""
        wanted = self._row.name_parts(kind or self._rule.sent)
        if not wanted or not clients:
            return torch.empty(len(clients), 0)
        few, found = deal(clients, WRITTEN), torch.empty(0, 0)
        for at, some in enumerate(few):
            parts = list(self._rounds.load(round, some, wanted).values())
            loaded = self._row.join_loaded(parts, some)
            if not at:
                found = torch.empty(len(clients), loaded.shape[1])
            found[at * WRITTEN : at * WRITTEN + len(some)] = loaded
        self._row.cut_(clients, found)
        return found

    def load_start(self, round: int, clients: Sequence[str]) -> Tensor:
        """What the clients' sent weights were at the start of a round [C, P]."""
        start_CP = self.load(round - 1, clients)
        self._row.clear_kept_(start_CP)
        return start_CP

    def stage(
        self,
        round: int,
        holder: str,
        clients: Sequence[str],
        sent_CP: Tensor,
        control_CP: Tensor | None = None,
    ) -> tuple[Staged, ...]:
        """Whole rows as pages of what clients receive; everyone's has what anybody might hold."""
        if not sent_CP.shape[1]:
            return ()
        cuts = None if list(clients) == [EVERYONE] else self._row.cuts_of(clients)
        rows = list(range(len(clients)))
        given = [sent_CP] if control_CP is None else [sent_CP, control_CP]
        tensors = {}
        for kind, rows_CP in zip(self._rule.received, given, strict=False):
            tensors[f"trunk.{kind}"] = self._row.part(rows_CP, rows, True, cuts)
            if self._row.client_width:
                tensors[f"client.{kind}"] = self._row.part(rows_CP, rows, False, cuts)
        return (self._rounds.stage(round, holder, clients, tensors),)

    def stage_others(
        self,
        round: int,
        learners: Sequence[str],
        accepted: Sequence[str],
        everyones: Sequence[slice],
        theta_1P: Tensor,
        fellows: Sequence[slice],
        given_CP: Tensor,
        row_of: Mapping[str, int],
    ) -> list[tuple[Staged, ...]]:
        """Pages of all who have no row of the mixture, with the columns that are theirs as well.

        Who never trained has no page and needs none of everyone's columns: everyone's page is
        written for all of them. Of a group's columns it does.

        Args:
            everyones: columns of which `theta_1P` is everyone's row.
            fellows: columns that a group has in common.
            row_of: learner -> the row of `given_CP` that is its group's too.
        """
        if not everyones and not row_of:
            return []
        kind = self._rule.received[0]
        owners = {
            owner
            for name in (f"client.{kind}", f"trunk.{kind}")
            for owner in self._rounds.owners(round - 1, name)
        }
        changed = row_of.keys() | (owners & set(learners) if everyones else set())
        others = deal(sorted(changed - set(accepted)), WRITTEN)
        held = [(f"others-{number}", few) for number, few in enumerate(others, 1)]
        if everyones:
            held = [("everyone", (EVERYONE,)), *held]
        files: list[tuple[Staged, ...]] = []
        for holder, some in held:
            rows = self.load(round - 1, some, kind)
            for own in everyones:
                rows[:, own] = theta_1P[:, own]
            theirs = [(row, row_of[c]) for row, c in enumerate(some) if c in row_of]
            for own in fellows:
                for row, given in theirs:
                    rows[row, own] = given_CP[given, own]
            self._row.cut_(some, rows)
            files.append(self.stage(round, holder, some, rows))
        return files

    def stage_own_starts(self, learners: Sequence[str]) -> list[tuple[Staged, ...]]:
        """A page for each learner, where the method has each begin with numbers of its own."""
        if self._config.method.begins_alike():
            return []
        lora, seed = self._config.model.lora, self._config.seed
        sides = {"client.values": self._cut.outer, "trunk.values": self._cut.sites["trunk"]}
        files: list[tuple[Staged, ...]] = []
        for at, some in enumerate(deal(learners, WRITTEN)):
            tensors = {
                name: torch.stack([start(sites, lora, seed, learner) for learner in some])
                for name, sites in sides.items()
            }
            files.append((self._rounds.stage(0, f"own-start-{at}", some, tensors),))
        return files
