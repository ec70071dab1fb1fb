"""Reading pages where they lie: ranges of a round's files, each page checked as it is read.

It must not know which page is whose state, nor what becomes of a damaged one.

Legend: S rows of a stacked tensor, one per client.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fellray.platform import pages
from fellray.platform.errors import FellrayError
from fellray.platform.manifest import Staged
from fellray.platform.messages import Damaged
from fellray.platform.page_index import Page
from fellray.platform.pages import DamagedPages, Head
from fellray.platform.shelf import folder
from fellray.platform.storage import Storage

Answer = TypeVar("Answer")


class PageReader:
    """The page files of one run; heads are read once."""

    def __init__(self, storage: Storage) -> None:
        """`storage` is the run's folder."""
        self._storage = storage
        self._heads: dict[tuple[int, str], Head] = {}

    def read_rows(self, round: int, one: Staged, rows: Sequence[int], name: str) -> torch.Tensor:
        """Rows [len(rows), ...] of a tensor, in the order asked; not to be written to.

        Raises:
            Damaged: a page is not what was written, or the file is gone.
        """
        return self._tell(
            round,
            one,
            lambda: pages.read_rows(self._read(round, one), self._head(round, one), rows, name),
        )

    def gather(self, located: Sequence[Page], name: str) -> torch.Tensor:
        """A tensor's rows [len(located), ...] from all the files where they lie.

        Raises:
            Damaged: as `read_rows`.
            FellrayError: the files do not fit together.
        """
        wanted: dict[tuple[int, str], tuple[Staged, list[int], list[int]]] = {}
        for to, (at, one, row) in enumerate(located):
            _, places, rows = wanted.setdefault((at, one.file), (one, [], []))
            places.append(to)
            rows.append(row)
        whole: torch.Tensor | None = None
        for (at, _), (one, places, rows) in sorted(wanted.items()):
            tensor = self.read_rows(at, one, rows, name)
            if len(wanted) == 1:
                return tensor
            if whole is None:
                whole = tensor.new_empty((len(located), *tensor.shape[1:]))
            if (whole.dtype, whole.shape[1:]) != (tensor.dtype, tensor.shape[1:]):
                raise FellrayError(
                    f"{self._storage}/{folder(at)}/{one.file}: {name} has another shape or dtype "
                    "than in other files of the run: it was made with another model; resume it "
                    "with its own config"
                )
            whole[torch.tensor(places)] = tensor
        assert whole is not None
        return whole

    def read_shared(self, round: int, one: Staged, name: str) -> torch.Tensor:
        """A tensor that belongs to nobody.

        Raises:
            Damaged: it is not what was written, or the file is gone.
        """
        return self._tell(
            round,
            one,
            lambda: pages.read_shared(self._read(round, one), self._head(round, one), name),
        )

    def find_damaged(self, round: int, one: Staged, rows: Sequence[int]) -> set[int]:
        """Of these rows those that have a page which is not what was written.

        Nothing that was read before is trusted. Where the tensors belong to nobody, row 0 is all.
        """
        if self._storage.sizes(folder(round)).get(one.file) != one.bytes:
            return set(rows)
        read, bad = self._read(round, one), set[int]()
        try:
            head = pages.read_head(read, one.sha256)
        except DamagedPages:
            return set(rows)
        for name in one.tensors:
            try:
                if one.clients:
                    pages.read_rows(read, head, rows, name)
                else:
                    pages.read_shared(read, head, name)
            except DamagedPages as error:
                bad |= set(rows if error.rows is None else error.rows)
        return bad

    def describe(self, round: int, file: str, size: int) -> Staged | None:
        """What a file of so many bytes says of itself; None where it cannot be read."""
        nameless = Staged(file, "", size, (), ())
        try:
            head = pages.read_head(self._read(round, nameless), None)
        except DamagedPages:
            return None
        return Staged(file, head.identity, size, head.clients, tuple(sorted(head.fields)))

    def forget(self, round: int) -> None:
        """Read the heads of a round's files anew when they are needed."""
        self._heads = {key: head for key, head in self._heads.items() if key[0] != round}

    def _head(self, round: int, one: Staged) -> Head:
        key = (round, one.file)
        if key not in self._heads:
            self._heads[key] = pages.read_head(self._read(round, one), one.sha256)
        return self._heads[key]

    def _read(self, round: int, one: Staged) -> pages.ReadRanges:
        path = f"{folder(round)}/{one.file}"

        def read(ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
            if any(offset + size > one.bytes for offset, size in ranges):
                raise DamagedPages("is damaged: its head names bytes beyond its end")
            try:
                return self._storage.read_ranges(path, ranges)
            except FellrayError:
                if self._storage.exists(path):
                    raise
                raise DamagedPages("is gone") from None

        return read

    def _tell(self, round: int, one: Staged, work: Callable[[], Answer]) -> Answer:
        try:
            return work()
        except DamagedPages as error:
            whose = [one.clients[row] for row in error.rows or () if one.clients]
            words = f" (client {', '.join(map(repr, whose[:3]))})" if whose else ""
            path = f"{self._storage}/{folder(round)}/{one.file}"
            raise Damaged(f"{path}: {error}{words}", round, one.file) from None
