"""The shelf: a folder for every round, and what makes a round count.

    rounds/000003/<holder>.safetensors    pages of the clients that changed, in any deal
    rounds/000003/manifest.json           written last, by the driver: now the round happened
    rounds/000003/pages.json              instead: pruned, but some pages are still somebody's last

A round without a whole manifest, or with a file of another size than the manifest says, does not
count; files in which every page is void do not matter. It must not know what is in the pages.
"""

import re
from collections.abc import Collection

from fellray.platform.manifest import Manifest, Uncommitted, decode, encode
from fellray.platform.messages import Damaged
from fellray.platform.storage import Storage
from fellray.platform.verdicts import Verdicts

MANIFEST = "manifest.json"
PAGES = "pages.json"
SUFFIX = ".safetensors"


class Shelf:
    """The rounds' folders of one run."""

    def __init__(self, storage: Storage, verdicts: Verdicts) -> None:
        """`storage` is the run's folder."""
        self._storage = storage
        self._verdicts = verdicts
        self.given_up: set[int] = set()
        """Rounds that are known to hold pages only."""

    def numbers(self) -> list[int]:
        """Rounds that have a folder, whatever is in it."""
        names = self._storage.list("rounds")
        return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))

    def latest(self) -> int | None:
        """The last round that counts."""
        return next((n for n in reversed(self.numbers()) if self.counts(n)), None)

    def committed(self) -> list[int]:
        """All rounds that count."""
        return [n for n in self.numbers() if n not in self.given_up and self.counts(n)]

    def held(self) -> list[int]:
        """The rounds up to the last that counts that have a manifest, damaged or not."""
        numbers = self.numbers()
        last = next((n for n in reversed(numbers) if self.counts(n)), None)
        if last is None:
            return []
        old = [n for n in numbers if n < last and n not in self.given_up]
        return [*(n for n in old if self._storage.exists(f"{folder(n)}/{MANIFEST}")), last]

    def dropped(self) -> list[Damaged]:
        """Why rounds after the last that counts, though they have a manifest, do not."""
        found = []
        for number in reversed(self.numbers()):
            try:
                self.read(number)
            except Damaged as error:
                found.append(error)
            except Uncommitted:
                continue
            else:
                break
        return found[::-1]

    def counts(self, round: int) -> bool:
        """Whether the round happened and is all there."""
        try:
            self.read(round)
        except (Uncommitted, Damaged):
            return False
        return True

    def read(self, round: int) -> Manifest:
        """The manifest of a round that counts.

        Raises:
            Uncommitted: it has none.
            Damaged: the manifest, or a file that it names, is not what was written.
        """
        where = f"{self._storage}/{folder(round)}"
        sizes = self._storage.sizes(folder(round))
        if MANIFEST not in sizes:
            why = f"round {round} was pruned" if PAGES in sizes else f"round {round} never happened"
            raise Uncommitted(f"{where}/{MANIFEST}: is not there: {why}")
        manifest = self._decode(round, MANIFEST)
        void = self._verdicts.void(round)
        for one in manifest.files:
            if sizes.get(one.file) != one.bytes and not (one.clients and void >= {*one.clients}):
                raise Damaged(
                    f"{where}/{one.file}: has {sizes.get(one.file, 'no')} bytes where the manifest "
                    f"says {one.bytes}",
                    round,
                    one.file,
                )
        return manifest

    def open(self, round: int) -> Manifest:
        """As `read`; what is raised says what to do."""
        try:
            return self.read(round)
        except Uncommitted as error:
            raise Uncommitted(self._explain(error, round)) from None
        except Damaged as error:
            raise self.tell(error, round) from None

    def read_old(self, round: int) -> Manifest | None:
        """What a round says of its pages, also when it was given up; None where it never counted.

        Its files are not looked at: most of them nobody needs any more.

        Raises:
            Damaged: it is not what was written.
        """
        for name in (MANIFEST, PAGES):
            if self._storage.exists(f"{folder(round)}/{name}"):
                manifest = self._decode(round, name)
                if name == PAGES:
                    self.given_up.add(round)
                return manifest
        return None

    def write(self, manifest: Manifest, name: str = MANIFEST) -> None:
        """Put the manifest there: now the round counts.

        Raises:
            FellrayError: a fact is not finite, or the storage refuses.
        """
        path = f"{folder(manifest.round)}/{name}"
        self._storage.write(path, encode(manifest, f"{self._storage}/{path}"))

    def clear(self, round: int, keep: Collection[str]) -> dict[str, int]:
        """Remove what earlier tries of a round left beside these files; bytes of what is there."""
        sizes = self._storage.sizes(folder(round))
        for file in sizes.keys() - set(keep):
            if file.endswith(SUFFIX) or file == PAGES:
                self._storage.delete(f"{folder(round)}/{file}")
        self.given_up.discard(round)
        return sizes

    def give_up(self, round: int) -> None:
        """The round does not count any more, and stays as a holder of pages."""
        if round in self.given_up:
            return
        path = f"{folder(round)}/{MANIFEST}"
        if self._storage.exists(path):
            self._storage.write(f"{folder(round)}/{PAGES}", self._storage.read(path))
            self._storage.delete(path)
        self.given_up.add(round)

    def delete(self, round: int) -> None:
        """Remove a round."""
        # what makes it count goes first: a round deleted by half must not count
        self._storage.delete(f"{folder(round)}/{MANIFEST}")
        self._storage.delete(f"{folder(round)}/{PAGES}")
        self._storage.delete(folder(round))
        self.given_up.discard(round)

    def tell(self, error: Damaged, round: int, shared: bool = False) -> Damaged:
        """The same, saying what to do.

        Args:
            round: what was asked for.
            shared: what is damaged belongs to all clients.
        """
        others = [number for number in self.committed() if number != round]
        words = f"{error}; committed rounds: {_join(others)}: restore the file"
        earlier = [number for number in others if number < round]
        if not others:
            words = f"{error}; no other round is committed: restore the file or start the run anew"
        elif not shared:
            words += ", or resume: `fellray train` says which clients go back to what is whole"
        elif earlier:
            words += f", or go back to round {earlier[-1]}: delete all later rounds, and resume"
        else:
            words += ", or start the run anew"
        return Damaged(words, error.round, error.file)

    def _explain(self, error: Uncommitted, round: int) -> str:
        others = self.committed()
        if not others:
            return f"{error}, and no other round is committed: first `fellray train`"
        words = str(error)
        if round < others[-1]:
            words = words.replace("never happened", "was pruned")
            words += "; `keep_last` says how many rounds stay"
        return f"{words}; committed rounds: {_join(others)}"

    def _decode(self, round: int, name: str) -> Manifest:
        path = f"{folder(round)}/{name}"
        return decode(self._storage.read(path), round, f"{self._storage}/{path}")


def folder(round: int) -> str:
    """Where a round lies in the run's folder."""
    assert round >= 0, round
    return f"rounds/{round:06d}"


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
