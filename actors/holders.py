"""Holders of adapters, as one: what the plants of all kinds of run have in common.

Client actors in a pool, who sits in which, who is asked, what they exchanged, what was lost, and a
round again after that. It must not know what a client trains, nor who else holds something.
"""

from collections.abc import Callable
from typing import Any, Self, TypeVar

import numpy as np

from fellray.actors.pool import Pool
from fellray.actors.replay import replay
from fellray.platform.config import RunConfig
from fellray.platform.manifest import Staged
from fellray.platform.messages import Damaged, LedgerRow
from fellray.platform.rounds import Rounds
from fellray.platform.sampling import Sampler
from fellray.platform.seating import Seating, choose

Answer = TypeVar("Answer")


class Holders:
    """Those behind a driver's verbs; a kind of run adds what a round is."""

    def __init__(
        self,
        config: RunConfig,
        learners: tuple[str, ...],
        sizes_C: np.ndarray,
        rounds: Rounds,
        clients: Pool,
    ):
        """Args: learners: everybody, sorted. sizes_C: rows of each one's training data."""
        self._config = config
        self._learners = learners
        self.registered = len(learners)
        """How many clients the run has."""
        self._rounds = rounds
        self._clients = clients
        self._seating = Seating(learners, config.clients.together)
        self._sampler = Sampler(config.sampling, config.seed, learners, sizes_C)
        self.learners = choose(learners, config.evaluation.clients)
        """Those who are evaluated, sorted."""
        self._pending: tuple[int, tuple[Staged, ...]] = (-1, ())
        """A round that is staged and not committed yet, and its files."""
        self._events: list[str] = []
        self._followed = rounds.decided
        """Verdicts on damaged files that all who hold something have heard of."""

    def sample(self, round: int) -> tuple[str, ...]:
        """Who is asked in a round."""
        return tuple(self._learners[i] for i in self._sampler.sample(round))

    def close_ledger(self) -> list[LedgerRow]:
        """What all clients exchanged since the last call, by client and kind."""
        rows = [row for answer in self._clients.map("close_ledger") for row in answer]
        return sorted(rows, key=lambda row: (row.client, row.kind))

    def take_events(self) -> list[str]:
        """What was lost, begun again or refused since the last call, in words."""
        events = list(self._events)
        self._events.clear()
        return events

    def replayed(self, work: Callable[..., Answer], *args: Any) -> Answer:
        """Run a round; if a holder was lost in it, everyone goes back to its start and again.

        So it is where a page is damaged, once it is decided who goes back to an earlier one. Where
        that was decided since the last round, at its commit, everyone goes back before.

        Raises:
            FellrayError: it was lost too often, or what is damaged cannot be replaced.
        """
        if self._followed != self._rounds.decided:
            self._forget()
        return replay(lambda: work(self, *args), self._mend, self._forget, self._events)

    def close(self) -> None:
        """End all actors."""
        self._clients.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self) -> None:
        """Everyone goes back to the last committed round."""
        self._clients.map("forget")
        self._pending = (-1, ())
        self._followed = self._rounds.decided

    def _mend(self, damage: Damaged) -> list[str]:
        """What was decided, in words; nothing where the file is whole by now."""
        return self._rounds.mend(damage)
