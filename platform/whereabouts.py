"""Whereabouts: in which round and file a client's state lies, kept up with the storage.

Manifests are read once, verdicts on damaged pages are followed. It must not know what is done with
a page.
"""

from collections.abc import Mapping, Sequence

from fellray.platform import pruning
from fellray.platform.errors import FellrayError
from fellray.platform.manifest import Staged
from fellray.platform.messages import Damaged
from fellray.platform.page_index import EVERYONE, Page, PageIndex
from fellray.platform.page_reader import PageReader
from fellray.platform.shelf import MANIFEST, Shelf, folder
from fellray.platform.storage import Storage
from fellray.platform.verdicts import Verdicts


class Whereabouts:
    """What one process knows of the rounds of a run."""

    def __init__(
        self, storage: Storage, shelf: Shelf, verdicts: Verdicts, reader: PageReader
    ) -> None:
        """`storage` is the run's folder."""
        self._storage = storage
        self._shelf = shelf
        self._verdicts = verdicts
        self._reader = reader
        self.index = PageIndex()
        self._looked = 0
        """How many rounds were known when those that are gone were last forgotten."""
        self._expected: tuple[int, dict[str, dict[str, Page]]] = (-1, {})
        self._expected_shared: tuple[Staged, ...] = ()
        self._sure = False
        """Whether verdicts were looked at since the last `look_again`."""

    def expect(self, round: int, staged: Sequence[Staged]) -> None:
        """See `Rounds.expect`."""
        found: dict[str, dict[str, Page]] = {}
        for one in staged:
            for name in one.tensors:
                held = found.setdefault(name, {})
                held |= {client: (round, one, row) for row, client in enumerate(one.clients)}
        self._expected = (round, found)
        self._expected_shared = tuple(one for one in staged if not one.clients)
        self._reader.forget(round)

    def look_again(self) -> None:
        """See `Rounds.look_again`."""
        self._sure = False

    def learn(self, round: int) -> None:
        """Know where every page up to a committed round lies.

        Raises:
            Uncommitted: the round is not committed.
            Damaged: a file that is needed to know is damaged.
        """
        if self._sure and round in self.index.manifests:
            return
        for number, clients in self._verdicts.look().items():
            self.index.withdraw(number, clients)
        self._sure = True
        if round in self.index.manifests:
            return
        own = self._shelf.open(round)
        if round - 1 not in self.index.manifests:  # otherwise all before it are known
            for number in self._shelf.numbers():
                if number < round and number not in self.index.manifests:
                    self._learn_old(number)
        self.index.enter(own, self._verdicts.void(round))
        self._forget_gone()

    def locate(self, round: int, clients: Sequence[str], name: str) -> list[Page]:
        """For each client the page that is its state at a round.

        Raises:
            Uncommitted: the round is not committed.
            Damaged: a file that is needed to know is damaged.
            FellrayError: a client has no such tensor.
        """
        staged: Mapping[str, Page] = {}
        before = round
        if self._only_expected(round):
            staged, before = self._expected[1].get(name, {}), round - 1
        if before >= 0:
            self.learn(before)
        *held, common = self.index.find(name, [*clients, EVERYONE], before)
        everyone = staged.get(EVERYONE) or common
        own = zip(clients, held, strict=True)
        located = [staged.get(client) or page or everyone for client, page in own]
        if lost := [c for c, page in zip(clients, located, strict=True) if page is None]:
            raise FellrayError(
                f"{self._storage}/{folder(round)}: has no {name!r} for {len(lost)} of "
                f"{len(clients)} clients, first {lost[0]!r}: the run was made with other "
                "clients or another model; resume it with its own config"
            )
        return [page for page in located if page]

    def shared(self, round: int) -> list[Staged]:
        """The files of a round, committed or expected, whose tensors belong to nobody.

        Raises:
            Uncommitted: it is neither.
            Damaged: a file that is needed to know is damaged.
        """
        if self._only_expected(round):
            return list(self._expected_shared)
        return [one for one in self._shelf.open(round).files if not one.clients]

    def _only_expected(self, round: int) -> bool:
        known = round == self._expected[0]
        return known and not self._storage.exists(f"{folder(round)}/{MANIFEST}")

    def _learn_old(self, number: int) -> None:
        try:
            manifest = self._shelf.read_old(number)
        except Damaged as error:
            raise self._shelf.tell(error, number) from None
        if manifest:
            self.index.enter(manifest, self._verdicts.void(number))

    def _forget_gone(self) -> None:
        """Of rounds that another process deleted nothing is needed; looked at now and then."""
        known = self.index.manifests.keys()
        if len(known) <= 2 * self._looked + pruning.SPARE:
            return
        for number in known - set(self._shelf.numbers()):
            self.index.leave(number)
            self._shelf.given_up.discard(number)
            self._reader.forget(number)
        self._looked = len(known)
