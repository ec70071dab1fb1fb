"""Mending: what becomes of a damaged file, decided once, by the driver.

A client whose page is damaged goes back, with all its tensors, to the newest earlier round in which
they are whole; a manifest is made again from its files. It must not know who reads what.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fellray.platform.manifest import Manifest, Staged, check_claims
from fellray.platform.messages import Damaged
from fellray.platform.page_index import EVERYONE, PageIndex
from fellray.platform.page_reader import PageReader
from fellray.platform.pruning import CARRIED
from fellray.platform.shelf import MANIFEST, PAGES, SUFFIX, Shelf, folder
from fellray.platform.storage import Storage
from fellray.platform.verdicts import Verdict, Verdicts

_NAMED = 12
"""Clients whose names an event gives."""


@dataclass(frozen=True)
class Mending:
    """What deciding takes; `index` knows all rounds up to the last."""

    storage: Storage
    shelf: Shelf
    verdicts: Verdicts
    index: PageIndex
    reader: PageReader

    def decide(self, damage: Damaged) -> list[Verdict]:
        """The verdicts that let a run go on; none where the file is found whole, or is staged only.

        Clients' pages that do not count any more are taken out of the index.

        Raises:
            Damaged: nothing can replace the file.
        """
        if damage.file in (MANIFEST, PAGES):
            return [self._make_manifest(damage)]
        manifest = self.index.manifests.get(damage.round)
        files = manifest.files if manifest else ()
        one = next((one for one in files if one.file == damage.file), None)
        if one is None:
            return []
        void = self.verdicts.void(damage.round)
        rows = [row for row, client in enumerate(one.clients or (None,)) if client not in void]
        bad = self.reader.find_damaged(damage.round, one, rows)
        if bad and (not one.clients or not damage.round):
            raise damage
        clients = [one.clients[row] for row in sorted(bad)]
        return self._take_back(damage.round, one, clients)

    def _take_back(self, round: int, one: Staged, clients: Collection[str]) -> list[Verdict]:
        """Void these clients' pages of the round, and of those before it until all are whole."""
        todo = {(round, one.file): set(clients)} if clients else {}
        void: list[tuple[int, str, set[str]]] = []
        while todo:
            # the newest first: what is before it matters only then
            key = max(todo)
            number, file = key
            lost = todo.pop(key)
            if EVERYONE in lost:
                lost |= self._trained(number)
            void.append((number, file, lost))
            self.index.withdraw(number, lost)
            for (at, own), (staged, rows) in self._leaning_on(number, lost).items():
                if bad := self.reader.find_damaged(at, staged, sorted(rows)):
                    todo.setdefault((at, own), set()).update(staged.clients[row] for row in bad)
        return [self._judge(number, file, lost) for number, file, lost in void]

    def _trained(self, round: int) -> set[str]:
        """Who has a page of what happened in a round: without everyone's it cannot stand."""
        files = _of_round(self.index.manifests[round].files)
        return {c for one in files for c in one.clients}

    def _leaning_on(
        self, round: int, clients: Collection[str]
    ) -> dict[tuple[int, str], tuple[Staged, set[int]]]:
        """The pages that are now these clients' state: round and file -> the file and its rows."""
        found: dict[tuple[int, str], tuple[Staged, set[int]]] = {}
        for pages in self.index.states(sorted(clients), round).values():
            for at, staged, row in pages:
                if at:  # the start can be made again
                    found.setdefault((at, staged.file), (staged, set()))[1].add(row)
        return found

    def _judge(self, round: int, file: str, clients: Collection[str]) -> Verdict:
        states = self.index.states(sorted(clients), round)
        own = {
            client: max((page[0] for page in pages if client in page[1].clients), default=None)
            for client, pages in states.items()
        }
        backs: dict[int, list[str]] = {}
        for client, pages in states.items():
            at = own[client]
            common = max((page[0] for page in pages), default=0)
            backs.setdefault(common if at is None else at, []).append(client)
        path = f"{folder(round)}/{file}"
        words = "; ".join(f"{_name(cs)} to {_name_round(at)}" for at, cs in sorted(backs.items()))
        event = f"{path} is damaged: back goes {words}"
        return Verdict(round, file, tuple(sorted(clients)), event)

    def _make_manifest(self, damage: Damaged) -> Verdict:
        round, name = damage.round, damage.file
        latest = self.shelf.latest()
        if latest is None:
            raise damage
        sizes = self.storage.sizes(folder(round))
        files = sorted(file for file in sizes if file.endswith(SUFFIX))
        told = {file: self.reader.describe(round, file, sizes[file]) for file in files}
        staged = tuple(one for one in told.values() if one)
        lost = [file for file, one in told.items() if one is None]
        try:
            check_claims(staged)
        except ValueError:
            raise damage from None
        # a run's rounds have the same facts
        self.shelf.write(Manifest(round, staged, self.shelf.read(latest).facts), name)
        event = f"{folder(round)}/{name} was damaged and made again from the round's files"
        clients: set[str] = set()
        if lost:
            # whose pages they held is not known, and nobody may be here on one side of the cut only
            clients = {c for one in _of_round(staged) for c in one.clients}
            self.index.withdraw(round, clients)
            words = f"{_name(sorted(clients))} to the round before" if clients else "nobody known"
            event += f", without {', '.join(lost)}, which cannot be read: back goes {words}"
        return Verdict(round, name, tuple(sorted(clients)), event)


def _of_round(files: Sequence[Staged]) -> list[Staged]:
    """Those that hold what happened in the round."""
    return [one for one in files if not one.file.startswith(CARRIED)]


def _name(clients: list[str]) -> str:
    if EVERYONE in clients:
        return "everyone"
    more = f" and {len(clients) - _NAMED} more" if len(clients) > _NAMED else ""
    return f"client{'s' * (len(clients) > 1)} {', '.join(clients[:_NAMED])}{more}"


def _name_round(round: int) -> str:
    return f"round {round}" if round else "the start (round 0)"
