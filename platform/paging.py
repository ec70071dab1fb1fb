"""Paging: clients' pages are read before they are wanted and written beside other work.

One thread does both, so files come in the order in which they were asked for. It must not know
banks or slots.

Shapes: s clients asked for.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from fellray.platform.manifest import Staged
from fellray.platform.rounds import Rounds

State = tuple[int, ...]
"""The round of each of a client's pages."""
Wanted = Mapping[str, State]
"""Client -> the state at which it is asked for."""
Rows = Mapping[str, Tensor]
"""Name -> [s, ...], on the CPU; not to be written to."""


class Paging:
    """The pages of one side of the cut."""

    def __init__(self, rounds: Rounds, names: Collection[str]):
        """Args: names: of the tensors of a page."""
        self._rounds = rounds
        self._names = [*names]
        self._disk = ThreadPoolExecutor(1, "pages")
        """Its thread begins with the first page."""
        self._ahead: tuple[Wanted, Future[dict[str, Tensor]]] | None = None

    def fetch(self, round: int, wanted: Wanted) -> None:
        """Begin to read what `read` will want next."""
        if wanted:
            reading = self._disk.submit(self._rounds.load, round, [*wanted], self._names)
            self._ahead = wanted, reading

    def read(self, round: int, wanted: Wanted) -> Iterator[tuple[Wanted, Rows]]:
        """Those clients' pages: what was fetched first, as far as it is still wanted.

        Raises:
            Damaged: a page is not what was written.
            FellrayError: as `Rounds.load`.
        """
        ahead, self._ahead = self._ahead, None
        # where something is wrong with what was fetched, reading it again says so
        if ahead and ahead[0].items() <= wanted.items() and ahead[1].exception() is None:
            yield ahead[0], ahead[1].result()
            wanted = {client: state for client, state in wanted.items() if client not in ahead[0]}
        if wanted:
            yield wanted, self._rounds.load(round, [*wanted], self._names)

    def write(self, stage: Callable[[], tuple[Staged, ...]]) -> Future[tuple[Staged, ...]]:
        """Stage a file while something else is done."""
        return self._disk.submit(stage)

    def forget(self) -> None:
        """What was fetched is of no use any more."""
        self._ahead = None
