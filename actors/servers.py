"""The servers: which of them holds whose trunk adapters, and what each of them is asked.

The clients of one actor are on one server. When that is lost the actor asks another one, and goes
back when it has returned. It does not know what an update is for, nor what becomes of a round.

Shapes: C clients, P parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fellray.actors.pool import Note, Pool
from fellray.platform.affinity import assign
from fellray.platform.errors import FellrayError
from fellray.platform.manifest import Staged
from fellray.platform.messages import Installation, Update
from fellray.platform.trunk import mean_gradient


class Servers:
    """The server actors, as one."""

    def __init__(self, pool: Pool, count: int, seat: Mapping[str, int], actors: int, note: Note):
        """Args:
        count: how many servers `pool` has.
        seat: client -> its actor, of so many `actors`.
        note: hears of actors that move.
        """
        self.pool = pool
        self.of_actor = assign(actors, count, range(count))
        """The server that each client actor asks."""
        self._count = count
        self._seat = seat
        self._note = note

    def place(self) -> None:
        """Whoever's server is lost asks another one, until it is back."""
        ready = self.pool.ready()
        before, actors = self._in_use(), len(self.of_actor)
        placed = assign(actors, self._count, ready)
        moved = sum(a != b for a, b in zip(placed, self.of_actor, strict=True))
        if moved:
            self._note(
                f"{moved} of {actors} client actors moved to another server: "
                f"{len(ready)} of {self._count} servers answer"
            )
        self.of_actor = placed
        # what a server holds that was left out for a while was given up meanwhile
        if back := sorted({*self._in_use()} - {*before}):
            self.pool.map("forget", among=back)

    def stage_start(self) -> tuple[Staged, ...]:
        """See `TrunkHost.stage_start`; all write the same."""
        files: tuple[Staged, ...] = self._map("stage_start")[0]
        return files

    def report(
        self, updates: Sequence[Update], shared: bool
    ) -> Callable[[], list[tuple[list[bool], np.ndarray]]]:
        """`TrunkHost.report` of the clients of each update, by update (one per actor)."""
        theirs = [
            [actor for actor, own in enumerate(self.of_actor) if own == server]
            for server in self._in_use()
        ]
        asked = self._ask(
            "report",
            [{life for i in own for life in updates[i].lives} for own in theirs],
            [[c for i in own for c in updates[i].clients] for own in theirs],
            [shared] * len(theirs),
        )

        def answer() -> list[tuple[list[bool], np.ndarray]]:
            found = {}
            for own, (finite, theta_CP) in zip(theirs, asked(), strict=True):
                at = 0
                for i in own:
                    rows = slice(at, at + len(updates[i].clients))
                    found[i] = finite[rows], theta_CP[rows]
                    at = rows.stop
            return [found[i] for i in range(len(updates))]

        return answer

    def install(
        self,
        clients: Sequence[str],
        make: Callable[[tuple[str, ...]], Installation],
        shared_P: np.ndarray | None,
    ) -> Callable[[], list[tuple[Staged, ...]]]:
        """See `TrunkHost.install`; each server's files.

        Args:
            clients: who took part.
            make: the installation of some of them.
        """
        on = self._in_use()
        return self._ask(
            "install",
            [make(self._of(clients, server)) for server in on],
            [shared_P] * len(on),
            [server == on[0] for server in on],
        )

    def shared_gradient(self, round: int, clients: Sequence[str]) -> np.ndarray | None:
        """The shared adapter's gradient [P] by all clients; None where there are none."""
        if not clients:
            return None
        theirs = [self._of(clients, server) for server in self._in_use()]
        rows_CP = np.concatenate(self._map("shared_gradient", [round] * len(theirs), theirs))
        return mean_gradient([c for own in theirs for c in own], rows_CP)

    def expect(self, round: int, staged: Sequence[Staged]) -> None:
        """See `Rounds.expect`."""
        each = len(self._in_use())
        self._map("expect", [round] * each, [staged] * each)

    def forget(self) -> None:
        """See `TrunkHost.forget`; whoever's server is lost asks another one from now on."""
        self.place()
        self._map("forget")

    def _in_use(self) -> list[int]:
        """The servers that some actor asks."""
        return sorted(set(self.of_actor))

    def _of(self, clients: Sequence[str], server: int) -> tuple[str, ...]:
        return tuple(c for c in clients if self.of_actor[self._seat[c]] == server)

    def _map(self, method: str, *columns: Sequence[Any]) -> list[Any]:
        return self._ask(method, *columns)()

    def _ask(self, method: str, *columns: Sequence[Any]) -> Callable[[], list[Any]]:
        return self.pool.ask(method, *columns, among=self._in_use())


def check_servers(servers: int, actors: int) -> None:
    """See that every server has an actor to serve.

    Raises:
        FellrayError: it has not.
    """
    if servers > actors:
        raise FellrayError(
            f"server.count={servers}: the clients sit in {actors} actor(s), and an actor asks one "
            f"server: set server.count={actors} or less, or clients.per_actor lower"
        )
