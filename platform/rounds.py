"""Committed rounds: what every holder of adapters put down, and which of it is whose state.

A round holds the pages of those clients only whose state changed in it: a client's state is its
last page up to the round asked for, or the page of `EVERYONE` where it has none, so a client that
never trained costs nothing. This file must not know what the tensors are for, nor who trains; what
makes a round count is the shelf's question.

Legend: S rows of a stacked tensor, one per client.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from fellray.platform import pruning
from fellray.platform.errors import FellrayError
from fellray.platform.manifest import Staged
from fellray.platform.mending import Mending
from fellray.platform.messages import Damaged
from fellray.platform.page_index import EVERYONE as EVERYONE
from fellray.platform.page_reader import PageReader
from fellray.platform.shelf import Shelf, folder
from fellray.platform.staging import Staging
from fellray.platform.storage import Storage
from fellray.platform.verdicts import Verdicts
from fellray.platform.whereabouts import Whereabouts

assert sys.byteorder == "little", "hashes are taken over little-endian bytes"
Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


def _in_turn(
    method: Callable[Concatenate["Rounds", Asked], Answer],
) -> Callable[Concatenate["Rounds", Asked], Answer]:
    """One thread at a time: pages are read and written while something else goes on."""

    @wraps(method)
    def wait(self: "Rounds", /, *args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
        with self._turn:
            return method(self, *args, **kwargs)

    return wait


class Rounds:
    """The rounds of one run. Rounds are numbered from 0; a client is named by its id."""

    def __init__(self, storage: Storage) -> None:
        """`storage` is the run's folder."""
        self._storage = storage
        self._verdicts = Verdicts(storage)
        self._shelf = Shelf(storage, self._verdicts)
        self._reader = PageReader(storage)
        self._staging = Staging(storage, self._shelf, self._verdicts)
        self._where = Whereabouts(storage, self._shelf, self._verdicts, self._reader)
        self._kept: list[int] = []
        """By the last `prune`, besides the last rounds."""
        self._turn = RLock()

    def __reduce__(self) -> tuple[type["Rounds"], tuple[Storage]]:
        return Rounds, (self._storage,)

    @_in_turn
    def stage(
        self,
        round: int,
        holder: str,
        clients: Sequence[str],
        tensors: Mapping[str, torch.Tensor],
    ) -> Staged:
        """Write one holder's tensors; they count only once the round is committed.

        In a committed round nothing but the very bytes that it has may be written once more: so a
        damaged file is restored.

        Args:
            round: which round.
            holder: names the file; staging again under the same name replaces it.
            clients: S client ids, one for each row; empty for tensors that belong to nobody.
            tensors: each [S, ...], or of any shape where `clients` is empty.

        Raises:
            FellrayError: the round is committed already, or the storage refuses.
        """
        return self._staging.stage(round, holder, clients, tensors)

    @_in_turn
    def commit(self, round: int, staged: Sequence[Staged], facts: Mapping[str, Any]) -> None:
        """Make the round happen. `facts` is plain JSON data kept with it.

        Raises:
            FellrayError: the round is committed already, a staged file is not there whole, a fact
                is not finite, or the storage refuses.
            ValueError: two files claim the same tensor of the same client.
        """
        self._staging.commit(round, staged, facts)

    def committed(self) -> list[int]:
        """All committed rounds, oldest first. Sizes are checked here, checksums when loading."""
        return self._shelf.committed()

    def latest(self) -> int | None:
        """The last committed round."""
        return self._shelf.latest()

    def dropped(self) -> list[str]:
        """Why rounds after the last committed one do not count though they did: file by file."""
        return [str(error) for error in self._shelf.dropped()]

    def facts(self, round: int) -> dict[str, Any]:
        """What `commit` was given.

        Raises:
            FellrayError: the round is not committed.
        """
        return self._shelf.open(round).facts

    @_in_turn
    def clients(self, round: int) -> list[str]:
        """Sorted ids of all clients that have a page of their own up to a committed round."""
        self._where.learn(round)
        return sorted(self._where.index.owners(round) - {EVERYONE})

    @_in_turn
    def owners(self, round: int, name: str) -> list[str]:
        """Sorted ids of all that have a page of a tensor up to a committed round; EVERYONE too."""
        self._where.learn(round)
        return sorted(self._where.index.owners(round, name))

    @_in_turn
    def expect(self, round: int, staged: Sequence[Staged]) -> None:
        """Files that are staged, here or elsewhere, for a round that is not committed yet.

        Until it is, `load` of that round finds them.
        """
        self._where.expect(round, staged)

    @_in_turn
    def page_rounds(self, round: int, clients: Sequence[str], name: str) -> list[int]:
        """For each client the round whose page is its state at `round`.

        Raises:
            FellrayError: as `load`.
        """
        return [page[0] for page in self._where.locate(round, clients, name)]

    @_in_turn
    def load(
        self, round: int, clients: Sequence[str], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The state of `clients` at a round, in that order, from whatever rounds and files hold it.

        Returns:
            name -> [len(clients), ...], on the CPU; not to be written to.

        Raises:
            Uncommitted: the round is not committed.
            Damaged: a page, or a file that is needed to find it, is damaged: see `mend`.
            FellrayError: a client has no such tensor.
        """
        assert clients, "nothing to load"
        loaded = {}
        for name in names:
            located = self._where.locate(round, clients, name)
            try:
                loaded[name] = self._reader.gather(located, name)
            except Damaged as error:
                raise self._shelf.tell(error, round) from None
        return loaded

    @_in_turn
    def shared(self, round: int) -> list[str]:
        """Sorted names of a round's tensors that belong to nobody.

        Raises:
            FellrayError: the round is not committed.
        """
        return sorted(name for one in self._where.shared(round) for name in one.tensors)

    @_in_turn
    def load_shared(self, round: int, name: str) -> torch.Tensor:
        """A tensor that belongs to nobody.

        Raises:
            FellrayError: the round is not committed, a file is damaged or there is no such tensor.
        """
        for one in self._where.shared(round):
            if name in one.tensors:
                try:
                    return self._reader.read_shared(round, one, name)
                except Damaged as error:
                    raise self._shelf.tell(error, round, shared=True) from None
        raise FellrayError(
            f"{self._storage}/{folder(round)}: has no shared {name!r}: the run was made with "
            "another model or server; resume it with its own config"
        )

    def hashes(
        self, round: int, names: Sequence[str], clients: Sequence[str] | None = None
    ) -> dict[str, str]:
        """For each client the sha256 of its rows' little-endian bytes, in order of names.

        It does not depend on which file holds a client, nor on the round's other clients.

        Args:
            clients: whose; by default all that have pages of their own, sorted.

        Raises:
            FellrayError: as `load`.
        """
        clients = self.clients(round) if clients is None else clients
        if not clients:
            return {}
        digests = [hashlib.sha256() for _ in clients]
        loaded = self.load(round, clients, names)
        for name in names:
            tensor = loaded[name]
            flat = tensor.reshape(len(clients), math.prod(tensor.shape[1:]))
            for digest, row in zip(digests, flat.view(torch.uint8).numpy(), strict=True):
                digest.update(row)
        return {c: digest.hexdigest() for c, digest in zip(clients, digests, strict=True)}

    @_in_turn
    def prune(self, keep_last: int, keep: Collection[int] = ()) -> None:
        """Give up all but the last `keep_last` committed rounds and those in `keep`.

        A round that is given up stays as a holder of pages as long as one of them is a client's
        state in a round that is kept; then it is deleted. What uncommitted rounds before the last
        committed one left behind goes too.

        Raises:
            Damaged: what is left of an old round cannot be known: see `mend`.
        """
        assert keep_last >= 1, keep_last
        held = self._shelf.held()
        if not held:
            return
        last = held[-keep_last:]
        kept = sorted({*last, *(n for n in keep if n in held)})
        self._kept = [n for n in kept if n < last[0]]
        self._where.learn(held[-1])
        for gone in pruning.prune(self._storage, self._shelf, self._where.index, kept):
            self._reader.forget(gone)

    @_in_turn
    def carry(self, round: int, staged: Sequence[Staged]) -> list[Staged]:
        """Stage what is left in the emptiest old rounds once more, so that they can be deleted.

        A client's state does not change by that; a round that nobody commits has carried nothing.

        Args:
            round: the round under way, after the last committed one.
            staged: its files.

        Returns:
            Further files for `commit`.

        Raises:
            FellrayError: a page is damaged, or the storage refuses.
        """
        # what another kept round needs would stay where it lies
        since = max(self._kept, default=-1)
        wanted = pruning.choose(self._shelf.given_up, self._where.index, since, staged)
        return [
            self.stage(
                round, f"{pruning.CARRIED}-{at}", clients, self.load(round - 1, clients, names)
            )
            for at, (names, clients) in enumerate(sorted(wanted.items()))
        ]

    @_in_turn
    def mend(self, damage: Damaged) -> list[str]:
        """Decide what becomes of a damaged file; only who holds the run's lock may.

        Clients whose pages are damaged go back to the newest earlier round in which all their
        tensors are whole. The decision lies on the storage before this returns; holders that are
        told to `look_again` follow it.

        Returns:
            What was decided, in words; nothing where the file is found whole, or is staged only.

        Raises:
            Damaged: nothing can replace the file.
            FellrayError: the storage refuses.
        """
        latest = self._shelf.latest()
        if latest is not None:
            try:
                self._where.learn(latest)
            except Damaged as earlier:
                damage = earlier
        index = self._where.index
        mending = Mending(self._storage, self._shelf, self._verdicts, index, self._reader)
        verdicts = mending.decide(damage)
        if verdicts:
            self._verdicts.add(verdicts)
        return [one.event for one in verdicts]

    def verdicts(self) -> list[str]:
        """What was decided about damaged files so far, in words."""
        return self._verdicts.events()

    @_in_turn
    def look_again(self) -> None:
        """A damaged file may have been decided on: follow that from the next read on."""
        self._where.look_again()
