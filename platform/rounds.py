"""Committed rounds: what every holder of adapters put down, and the manifest that makes it count.

    rounds/000003/<holder>.safetensors    pages of the clients that changed, in any deal
    rounds/000003/manifest.json           written last, by the driver: now the round happened
    rounds/000003/pages.json              instead: pruned, but some pages are still somebody's last

A round holds the pages of those clients only whose state changed in it: a client's state is its
last page up to the round asked for, or the page of `EVERYONE` where it has none, so a client that
never trained costs nothing. A round without a whole manifest, or with a file of another size than
the manifest says, did not happen. This file must not know what the tensors are for, nor who trains.

Legend: S rows of a stacked tensor, one per client.
"""

import hashlib
import math
import re
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import nsmallest
from typing import Any

import torch

from fellray.platform import pages
from fellray.platform.errors import FellrayError
from fellray.platform.manifest import Manifest, Staged, Uncommitted, check_claims, decode, encode
from fellray.platform.pages import DamagedPages, Head
from fellray.platform.storage import Storage

EVERYONE = ""
"""Whose page is the state of all clients that have none of their own."""
SPARE = 64
"""Rounds that were given up may be as many before their last pages are carried on."""
_MANIFEST = "manifest.json"
_PAGES = "pages.json"
Page = tuple[int, Staged, int]
"""Round, file and row."""
_HOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

assert sys.byteorder == "little", "hashes are taken over little-endian bytes"


class Rounds:
    """The rounds of one run. Rounds are numbered from 0; a client is named by its id."""

    def __init__(self, storage: Storage) -> None:
        """`storage` is the run's folder."""
        self._storage = storage
        self._known: dict[int, Manifest] = {}
        self._pages: dict[str, dict[str, list[Page]]] = {}
        """Tensor -> client -> its pages by round."""
        self._last: Counter[int] = Counter()
        """Round -> how many of its pages no later round has replaced."""
        self._given_up: set[int] = set()
        """Rounds that are known to hold pages only."""
        self._kept: list[int] = []
        """By the last `prune`, besides the last rounds."""
        self._looked = 0
        """How many rounds were known when those that are gone were last forgotten."""
        self._heads: dict[tuple[int, str], Head] = {}
        self._expected: tuple[int, dict[str, dict[str, Page]]] = (-1, {})

    def __reduce__(self) -> tuple[type["Rounds"], tuple[Storage]]:
        return Rounds, (self._storage,)

    def stage(
        self,
        round: int,
        holder: str,
        clients: Sequence[str],
        tensors: Mapping[str, torch.Tensor],
    ) -> Staged:
        """Write one holder's tensors; they count only once the round is committed.

        Args:
            round: which round.
            holder: names the file; staging again under the same name replaces it.
            clients: S client ids, one for each row; empty for tensors that belong to nobody.
            tensors: each [S, ...], or of any shape where `clients` is empty.

        Raises:
            FellrayError: the round is committed already, or the storage refuses.
        """
        assert _HOLDER.fullmatch(holder), holder
        assert len(set(clients)) == len(clients), "a client has one row"
        for name, tensor in tensors.items():
            assert not clients or tensor.shape[:1] == (len(clients),), (name, tensor.shape)
        self._refuse_committed(round)
        data, identity = pages.encode(clients, tensors)
        file = f"{holder}.safetensors"
        self._storage.write(f"{_folder(round)}/{file}", data)
        return Staged(file, identity, len(data), tuple(clients), tuple(sorted(tensors)))

    def commit(self, round: int, staged: Sequence[Staged], facts: Mapping[str, Any]) -> None:
        """Make the round happen. `facts` is plain JSON data kept with it.

        Raises:
            FellrayError: the round is committed already, a staged file is not there whole, a fact
                is not finite, or the storage refuses.
            ValueError: two files claim the same tensor of the same client.
        """
        self._refuse_committed(round)
        files = sorted(staged, key=lambda s: s.file)
        check_claims(files)
        folder = _folder(round)
        sizes = self._storage.sizes(folder)
        for one in files:
            if sizes.get(one.file) != one.bytes:
                raise FellrayError(
                    f"{self._storage}/{folder}/{one.file}: has {sizes.get(one.file, 'no')} bytes "
                    f"where {one.bytes} were staged, so round {round} is not committed; every "
                    "actor must reach the same `storage`: use a shared folder or a URI, then resume"
                )
        path = f"{folder}/{_MANIFEST}"
        data = encode(Manifest(round, tuple(files), dict(facts)), f"{self._storage}/{path}")
        self._storage.write(path, data)

    def committed(self) -> list[int]:
        """All committed rounds, oldest first. Sizes are checked here, checksums when loading."""
        return [n for n in self._numbers() if n not in self._given_up and self._counts(n)]

    def latest(self) -> int | None:
        """The last committed round."""
        return next((n for n in reversed(self._numbers()) if self._counts(n)), None)

    def facts(self, round: int) -> dict[str, Any]:
        """What `commit` was given.

        Raises:
            FellrayError: the round is not committed.
        """
        return self._open(round).facts

    def clients(self, round: int) -> list[str]:
        """Sorted ids of all clients that have a page of their own up to a committed round."""
        self._learn(round)
        own = {
            client
            for of_name in self._pages.values()
            for client, held in of_name.items()
            if held and held[0][0] <= round
        }
        return sorted(own - {EVERYONE})

    def expect(self, round: int, staged: Iterable[Staged]) -> None:
        """Files that are staged, here or elsewhere, for a round that is not committed yet.

        Until it is, `load` of that round finds them.
        """
        found: dict[str, dict[str, Page]] = {}
        for one in staged:
            for name in one.tensors:
                held = found.setdefault(name, {})
                held |= {client: (round, one, row) for row, client in enumerate(one.clients)}
        self._expected = (round, found)
        self._heads = {key: head for key, head in self._heads.items() if key[0] != round}

    def page_rounds(self, round: int, clients: Sequence[str], name: str) -> list[int]:
        """For each client the round whose page is its state at `round`.

        Raises:
            FellrayError: as `load`.
        """
        return [page[0] for page in self._locate(round, clients, name)]

    def load(
        self, round: int, clients: Sequence[str], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The state of `clients` at a round, in that order, from whatever rounds and files hold it.

        Returns:
            name -> [len(clients), ...], on the CPU; not to be written to.

        Raises:
            FellrayError: the round is not committed, a page is damaged, or a client has no such
                tensor.
        """
        assert clients, "nothing to load"
        return {name: self._gather(round, clients, name) for name in names}

    def load_shared(self, round: int, name: str) -> torch.Tensor:
        """A tensor that belongs to nobody.

        Raises:
            FellrayError: the round is not committed, a file is damaged or there is no such tensor.
        """
        for one in self._open(round).files:
            if not one.clients and name in one.tensors:
                try:
                    return pages.read_shared(self._reader(round, one), self._head(round, one), name)
                except DamagedPages as error:
                    raise self._told(round, round, one, error) from None
        raise FellrayError(
            f"{self._storage}/{_folder(round)}: has no shared {name!r}: the run was made with "
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

    def prune(self, keep_last: int, keep: Collection[int] = ()) -> None:
        """Give up all but the last `keep_last` committed rounds and those in `keep`.

        A round that is given up stays as a holder of pages as long as one of them is a client's
        state in a round that is kept; then it is deleted. What uncommitted rounds before the last
        committed one left behind goes too.
        """
        assert keep_last >= 1, keep_last
        committed = self.committed()
        last = committed[-keep_last:]
        kept = sorted({*last, *(n for n in keep if n in committed)})
        if not committed:
            return
        self._kept = [n for n in kept if n < last[0]]
        self._learn(committed[-1])
        for number in self._numbers():
            folder = _folder(number)
            if number in kept:
                self._storage.sweep(folder)
            elif number < committed[-1]:
                if self._is_needed(number, kept):
                    self._demote(number)
                    continue
                # what makes it count goes first: a round deleted by half must not count
                self._storage.delete(f"{folder}/{_MANIFEST}")
                self._storage.delete(f"{folder}/{_PAGES}")
                self._storage.delete(folder)
                self._leave(number)

    def carry(self, round: int, staged: Sequence[Staged]) -> list[Staged]:
        """Stage what is left in the emptiest old rounds once more, so that they can be deleted.

        Where clients are sampled from many, rounds that were given up stay for a few clients who
        were not asked since. From `SPARE` such rounds on, the emptiest are written again in the
        round under way, at most as many pages as it has anyway. A client's state does not change
        by that; a round that nobody commits has carried nothing.

        Args:
            round: the round under way, after the last committed one.
            staged: its files.

        Returns:
            Further files for `commit`.

        Raises:
            FellrayError: a page is damaged, or the storage refuses.
        """
        if len(self._given_up) <= SPARE:
            return []
        claimed = {(name, c) for one in staged for name in one.tensors for c in one.clients}
        room = len(claimed)
        # what another kept round needs would stay where it lies
        since = max(self._kept, default=-1)
        old = [n for n in self._given_up if n > since and self._last[n]]
        wanted: dict[tuple[str, ...], list[str]] = {}
        for number in nsmallest(len(claimed), old, key=self._last.__getitem__):
            rest = self._rest(number, claimed)
            room -= sum(len(names) for names, _ in rest)
            if room < 0:
                break
            for names, client in rest:
                wanted.setdefault(names, []).append(client)
        return [
            self.stage(round, f"carried-{at}", clients, self.load(round - 1, clients, names))
            for at, (names, clients) in enumerate(sorted(wanted.items()))
        ]

    def _rest(
        self, round: int, claimed: Collection[tuple[str, str]]
    ) -> list[tuple[tuple[str, ...], str]]:
        """A round's pages that are their clients' last and stay so: tensors and client."""
        found = []
        for one in self._known[round].files:
            for client in one.clients:
                names = tuple(
                    name
                    for name in one.tensors
                    if self._pages[name][client][-1][0] == round and (name, client) not in claimed
                )
                if names:
                    found.append((names, client))
        return found

    def _refuse_committed(self, round: int) -> None:
        path = f"{_folder(round)}/{_MANIFEST}"
        if not self._storage.exists(path):
            return
        if self._counts(round):
            raise FellrayError(
                f"{self._storage}/{path}: round {round} is committed already and stays as it is; "
                "resume the run, which goes on after its last committed round"
            )
        # files staged anew could make a broken round's old manifest look whole again
        self._storage.delete(path)

    def _numbers(self) -> list[int]:
        names = self._storage.list("rounds")
        return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))

    def _counts(self, round: int) -> bool:
        try:
            self._check(round)
        except Uncommitted:
            return False
        return True

    def _open(self, round: int) -> Manifest:
        try:
            return self._check(round)
        except Uncommitted as error:
            raise Uncommitted(f"{error}{self._way_out(round)}") from None

    def _check(self, round: int, name: str = _MANIFEST) -> Manifest:
        folder = _folder(round)
        where = f"{self._storage}/{folder}"
        sizes = self._storage.sizes(folder)
        if name not in sizes:
            raise Uncommitted(f"{where}/{name}: is not there: round {round} never happened")
        data = self._storage.read(f"{folder}/{name}")
        manifest = decode(data, round, f"{where}/{name}")
        for one in manifest.files:
            if sizes.get(one.file) != one.bytes:
                raise Uncommitted(
                    f"{where}/{one.file}: has {sizes.get(one.file, 'no')} bytes where the manifest "
                    f"says {one.bytes}"
                )
        return manifest

    def _learn(self, round: int) -> None:
        """Know where every page up to a committed round lies."""
        if round in self._known:
            return
        own = self._open(round)
        if round - 1 not in self._known:  # otherwise all before it are known
            for number in self._numbers():
                if number < round and number not in self._known:
                    self._learn_old(number)
        self._enter(own)
        self._forget_gone()

    def _learn_old(self, number: int) -> None:
        for name in (_MANIFEST, _PAGES):
            if self._storage.exists(f"{_folder(number)}/{name}"):
                try:
                    self._enter(self._check(number, name))
                except Uncommitted as error:
                    raise FellrayError(f"{error}{self._way_out(number)}") from None
                if name == _PAGES:
                    self._given_up.add(number)
                return

    def _forget_gone(self) -> None:
        """Of rounds that another process deleted nothing is needed; looked at now and then."""
        if len(self._known) <= 2 * self._looked + SPARE:
            return
        for number in self._known.keys() - set(self._numbers()):
            self._leave(number)
        self._looked = len(self._known)

    def _enter(self, manifest: Manifest) -> None:
        self._known[manifest.round] = manifest
        for one in manifest.files:
            for name in one.tensors:
                of_name = self._pages.setdefault(name, {})
                for row, client in enumerate(one.clients):
                    held = of_name.setdefault(client, [])
                    at = bisect_right(held, manifest.round, key=_round_of)
                    if at == len(held):
                        self._last[manifest.round] += 1
                        if held:
                            self._last[held[-1][0]] -= 1
                    held.insert(at, (manifest.round, one, row))

    def _leave(self, round: int) -> None:
        manifest = self._known.pop(round, None)
        for one in manifest.files if manifest else ():
            self._heads.pop((round, one.file), None)
            for name in one.tensors:
                of_name = self._pages[name]
                for row, client in enumerate(one.clients):
                    held = of_name[client]
                    was_last = held[-1][0] == round
                    held.remove((round, one, row))
                    if was_last and held:
                        self._last[held[-1][0]] += 1
                    elif not held:
                        del of_name[client]
        self._last.pop(round, None)
        self._given_up.discard(round)

    def _is_needed(self, round: int, kept: Sequence[int]) -> bool:
        """Whether a page of this round is somebody's state in one of the kept rounds."""
        if round not in self._known:
            return False
        if self._last[round]:
            return True  # by the last kept round, which is later
        for one in self._known[round].files:
            for name in one.tensors:
                for client in one.clients:
                    held = self._pages[name][client]
                    at = bisect_right(held, round, key=_round_of)
                    until = held[at][0] if at < len(held) else math.inf
                    if any(round <= k < until for k in kept):
                        return True
        return False

    def _demote(self, round: int) -> None:
        if round in self._given_up:
            return
        folder = _folder(round)
        if self._storage.exists(f"{folder}/{_MANIFEST}"):
            data = self._storage.read(f"{folder}/{_MANIFEST}")
            self._storage.write(f"{folder}/{_PAGES}", data)
            self._storage.delete(f"{folder}/{_MANIFEST}")
        self._given_up.add(round)

    def _locate(self, round: int, clients: Sequence[str], name: str) -> list[Page]:
        expected, found = self._expected
        staged: Mapping[str, Page] = {}
        before = round
        if round == expected and not self._storage.exists(f"{_folder(round)}/{_MANIFEST}"):
            staged, before = found.get(name, {}), round - 1
        if before >= 0:
            self._learn(before)
        held = self._pages.get(name, {})

        def last(client: str) -> Page | None:
            if client in staged:
                return staged[client]
            own = held.get(client, ())
            at = bisect_right(own, before, key=_round_of)
            return own[at - 1] if at else None

        everyone = last(EVERYONE)
        located = [last(client) or everyone for client in clients]
        if lost := [c for c, page in zip(clients, located, strict=True) if page is None]:
            raise FellrayError(
                f"{self._storage}/{_folder(round)}: has no {name!r} for {len(lost)} of "
                f"{len(clients)} clients, first {lost[0]!r}: the run was made with other "
                "clients or another model; resume it with its own config"
            )
        return [page for page in located if page]

    def _gather(self, round: int, clients: Sequence[str], name: str) -> torch.Tensor:
        wanted: dict[tuple[int, str], tuple[Staged, list[int], list[int]]] = {}
        for to, (at, one, row) in enumerate(self._locate(round, clients, name)):
            _, places, rows = wanted.setdefault((at, one.file), (one, [], []))
            places.append(to)
            rows.append(row)
        whole: torch.Tensor | None = None
        for (at, _), (one, places, rows) in sorted(wanted.items()):
            try:
                read = self._reader(at, one)
                tensor = pages.read_rows(read, self._head(at, one), rows, name)
            except DamagedPages as error:
                raise self._told(round, at, one, error) from None
            if len(wanted) == 1:
                return tensor
            if whole is None:
                whole = tensor.new_empty((len(clients), *tensor.shape[1:]))
            if (whole.dtype, whole.shape[1:]) != (tensor.dtype, tensor.shape[1:]):
                raise FellrayError(
                    f"{self._storage}/{_folder(at)}/{one.file}: {name} has another shape or "
                    f"dtype than in the round's other files{self._way_out(round)}"
                )
            whole[torch.tensor(places)] = tensor
        assert whole is not None
        return whole

    def _head(self, round: int, one: Staged) -> Head:
        key = (round, one.file)
        if key not in self._heads:
            self._heads[key] = pages.read_head(self._reader(round, one), one.sha256)
        return self._heads[key]

    def _reader(self, round: int, one: Staged) -> pages.ReadRanges:
        def read(ranges: Sequence[tuple[int, int]]) -> list[bytes]:
            if any(offset + size > one.bytes for offset, size in ranges):
                raise DamagedPages("is damaged: its head names bytes beyond its end")
            return self._storage.read_ranges(f"{_folder(round)}/{one.file}", ranges)

        return read

    def _told(self, round: int, at: int, one: Staged, error: DamagedPages) -> FellrayError:
        whose = f" (client {one.clients[error.row]!r})" if error.row is not None else ""
        return FellrayError(
            f"{self._storage}/{_folder(at)}/{one.file}: {error}{whose}{self._way_out(round)}"
        )

    def _way_out(self, round: int) -> str:
        others = [str(number) for number in self.committed() if number != round]
        if not others:
            return "; no other round is committed: restore the file or start the run anew"
        return (
            f"; committed rounds: {', '.join(others)}: restore the file, or go back to one of them "
            "by deleting the folders of the later rounds and resuming"
        )


def _folder(round: int) -> str:
    assert round >= 0, round
    return f"rounds/{round:06d}"


def _round_of(page: Page) -> int:
    return page[0]
