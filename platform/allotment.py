"""The allotment: what every learner is given at a round's end, made of the mixture.

A method's server step and control variates come in here, and each learner's own rank and cut. It
must not know how rows were mixed, who holds them, nor where actors are.

Shapes: C learners with a row of the mixture, P sent parameters of one learner.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fellray.platform.aggregation import Plan, Reports, split_columns
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.handover import METHOD
from fellray.platform.local import SERVER_CONTROL, advance_server_control
from fellray.platform.manifest import Staged
from fellray.platform.messages import Installation
from fellray.platform.rounds import EVERYONE, Rounds
from fellray.platform.sent_pages import SentPages
from fellray.platform.sent_row import SentRow
from fellray.platform.server_step import Snapshot, State
from fellray.platform.slabs import mix

NOBODY: Mapping[str, str] = MappingProxyType({})


class Allotment:
    """Of one round. Making it stages what the method's step keeps."""

    def __init__(
        self,
        config: RunConfig,
        row: SentRow,
        pages: SentPages,
        rounds: Rounds,
        reports: Reports,
        plan: Plan,
        mixed_CP: Tensor,
        learners: Sequence[str],
        groups: Mapping[str, str] = NOBODY,
    ):
        """A row is cut to its learner's own rank, in place; one that is everyone's stays whole.

        Args:
            learners: everyone in the run.
            groups: learner -> its group, where clients have groups.

        Raises:
            FellrayError: control variates, and the method's plan is not one for everyone.
            ValueError: as `SentRow.check_private`. So does `stage`, where the plan mixes within
                groups and clients have none.
        """
        self._config, self._row, self._pages, self._rounds = config, row, pages, rounds
        self._round, self._accepted = reports.meta.round, reports.meta.clients
        self._learners = learners
        parts = split_columns(plan, reports.blocks, row.width) if len(self._accepted) else []
        self._everyones = [columns for part, columns in parts if part.common]
        self._common = 0 < len(parts) == len(self._everyones)
        self._groups = groups
        self._fellows = [columns for part, columns in parts if part.within]
        """Columns that a group's members have in common."""
        row.check_private(plan, reports.blocks)
        mixed_CP, self._method_files = self._take_step(reports, plan, mixed_CP)
        self._refused = set(reports.refused)
        # who is refused has no row; any will do, nobody reads it
        self._place = {c: i for i, c in enumerate(self._accepted)} | dict.fromkeys(self._refused, 0)
        self.took_part = tuple(sorted(self._place))
        mixed_CP = row.keep_frozen(mixed_CP, self._common)
        self._theta_1P = mixed_CP[:1]
        if not self._common:
            self._theta_1P = self._theta_1P.clone()
            row.cut_(self._accepted, mixed_CP)
        nothing = mixed_CP.new_zeros(1, mixed_CP.shape[1])
        self._given = mixed_CP if len(self._accepted) else nothing
        self._control_1P = self._advance_control(reports)

    def give(self, clients: Sequence[str], at_server: bool) -> Installation:
        """What one side is given of some who took part."""
        rows = [0] if self._common else [self._place[c] for c in clients]
        cuts = None if self._common else self._row.cuts_of(clients)
        given = self._row.part(self._given, rows, at_server, cuts)
        if not at_server and self._row.up_columns is not None:
            given = given[:, self._row.up_columns]
        if self._control_1P is not None:
            control = self._row.part(self._control_1P, [0], at_server, None)
            given = torch.cat([given, control], 1)
        theta = given.numpy()
        if self._common:
            theta = np.broadcast_to(theta, (len(clients), theta.shape[1]))
        here = tuple(c for c in clients if c in self._refused)
        return Installation(self._round, tuple(clients), theta, here, self._common)

    def stage(self) -> list[tuple[Staged, ...]]:
        """Pages of what is everyone's, and of those who are not given anything but that."""
        if not self._common:
            files = self._pages.stage_others(
                self._round,
                self._learners,
                self._accepted,
                self._everyones,
                self._theta_1P,
                self._fellows,
                self._given,
                self._follow() if self._fellows else {},
            )
        else:
            theta, control = self._theta_1P, self._control_1P
            files = [self._pages.stage(self._round, "everyone", [EVERYONE], theta, control)]
        return [*files, self._method_files]

    def _follow(self) -> dict[str, int]:
        """Who takes which row of the mixture although it has none: learner -> a fellow's."""
        if not self._groups:
            raise ValueError("the plan mixes within groups, and the clients have none")
        of_group = {self._groups[c]: self._place[c] for c in reversed(self._accepted)}
        absent = set(self._learners) - set(self._accepted)
        return {c: of_group[g] for c in sorted(absent) if (g := self._groups[c]) in of_group}

    def _take_step(
        self, reports: Reports, plan: Plan, mixed_CP: Tensor
    ) -> tuple[Tensor, tuple[Staged, ...]]:
        """The rows after the method's own step, and its state as a file of the round."""
        if plan.step is None:
            return mixed_CP, ()
        before, accepted = self._round - 1, self._accepted
        state: State = {
            name.removeprefix(METHOD): self._rounds.load_shared(before, name)
            for name in self._rounds.shared(before)
            if name.startswith(METHOD)
        }
        if accepted:
            # everyone's page is of the largest rank, as the mixture
            whose = [EVERYONE] if self._common else accepted
            start_RP = self._pages.load_start(self._round, whose)
            rank, mixed_RP = self._config.model.lora.r, mixed_CP[: len(start_RP)]
            seen = Snapshot(start_RP, mixed_RP, reports.theta_CP, reports.blocks, rank)
            rows_RP, state = plan.step.take(seen, state)
            mixed_CP = rows_RP.expand(len(accepted), -1)
        if not state:
            return mixed_CP, ()
        tensors = {f"{METHOD}{name}": tensor for name, tensor in state.items()}
        return mixed_CP, (self._rounds.stage(self._round, "method", (), tensors),)

    def _advance_control(self, reports: Reports) -> Tensor | None:
        """The servers' control variate after the round [1, P]; None where there is none, or nothing
        to move it."""
        meta = reports.meta
        if not self._config.method.local().controls or not meta.clients:
            return None
        if not self._common:
            raise FellrayError(
                "control variates are for a mixture that is everyone's: `plan` must answer "
                "Plan(..., common=True), or `local` a rule without controls"
            )
        train, some = self._config.train, meta.clients[:1]
        steps_C = (meta.samples_C / train.batch_size).ceil()
        weights_C = 1 / (steps_C * train.learning_rate)
        mean_1P = torch.empty(1, self._row.width)
        mix((weights_C / weights_C.sum()).repeat(len(weights_C), 1), reports.theta_CP, mean_1P)
        before_1P, start_1P = (
            self._pages.load(meta.round - 1, some, kind) for kind in (SERVER_CONTROL, "values")
        )
        registered = len(self._learners)
        return advance_server_control(before_1P, start_1P, mean_1P, weights_C, registered)
