"""The index of pages: in which round, file and row every client's state lies.

It holds what manifests say and what was declared void since. It must not know where the files are,
nor what is in them.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Sequence

from fellray.platform.manifest import Manifest, Staged

EVERYONE = ""
"""Whose page is the state of all clients that have none of their own."""
Page = tuple[int, Staged, int]
"""Round, file and row."""


class PageIndex:
    """Pages of the rounds that were entered; a client's state is its last one."""

    def __init__(self) -> None:
        self.manifests: dict[int, Manifest] = {}
        """Of every round that is known."""
        self._pages: dict[str, dict[str, list[Page]]] = {}
        """Tensor -> client -> its pages by round."""
        self._last: Counter[int] = Counter()
        """Round -> how many of its pages no later round has replaced."""

    def enter(self, manifest: Manifest, void: Collection[str]) -> None:
        """Know a round, without the pages of the clients in `void`."""
        self.manifests[manifest.round] = manifest
        for one in manifest.files:
            for name in one.tensors:
                of_name = self._pages.setdefault(name, {})
                for row, client in enumerate(one.clients):
                    if client in void:
                        continue
                    held = of_name.setdefault(client, [])
                    at = bisect_right(held, manifest.round, key=_round_of)
                    if at == len(held):
                        self._last[manifest.round] += 1
                        if held:
                            self._last[held[-1][0]] -= 1
                    held.insert(at, (manifest.round, one, row))

    def leave(self, round: int) -> None:
        """Forget a round."""
        manifest = self.manifests.pop(round, None)
        for one in manifest.files if manifest else ():
            self._take_out(round, one, one.clients)
        self._last.pop(round, None)

    def withdraw(self, round: int, clients: Collection[str]) -> None:
        """The pages of these clients in a round are void from now on."""
        manifest = self.manifests.get(round)
        for one in manifest.files if manifest else ():
            self._take_out(round, one, [c for c in one.clients if c in clients])

    def owners(self, round: int, name: str | None = None) -> set[str]:
        """Who has a page up to a round. Args: name: of this tensor; None: of any."""
        return {
            client
            for of_name in ([self._pages.get(name, {})] if name else self._pages.values())
            for client, held in of_name.items()
            if held and held[0][0] <= round
        }

    def find(self, name: str, clients: Sequence[str], round: int) -> list[Page | None]:
        """Each client's own last page of a tensor up to a round."""
        of_name = self._pages.get(name, {})
        found: list[Page | None] = []
        for client in clients:
            held = of_name.get(client, ())
            at = bisect_right(held, round, key=_round_of)
            found.append(held[at - 1] if at else None)
        return found

    def states(self, clients: Sequence[str], round: int) -> dict[str, list[Page]]:
        """Client -> all pages of its state at a round; none where nothing is left of it."""
        names = sorted(self._pages)
        everyone = {name: self.find(name, [EVERYONE], round)[0] for name in names}
        own = {name: self.find(name, clients, round) for name in names}
        return {
            client: [page for name in names if (page := own[name][i] or everyone[name])]
            for i, client in enumerate(clients)
        }

    def count_last(self, round: int) -> int:
        """How many pages of a round are still their clients' last."""
        return self._last[round]

    def is_needed(self, round: int, kept: Sequence[int]) -> bool:
        """Whether a page of this round is somebody's state in one of the kept rounds."""
        if round not in self.manifests:
            return False
        if self._last[round]:
            return True  # by the last kept round, which is later
        for one in self.manifests[round].files:
            for name in one.tensors:
                for client in one.clients:
                    held = self._pages[name].get(client, [])
                    at = bisect_right(held, round, key=_round_of)
                    if not at or held[at - 1][0] != round:
                        continue  # void
                    until = held[at][0] if at < len(held) else math.inf
                    if any(round <= k < until for k in kept):
                        return True
        return False

    def rest(
        self, round: int, claimed: Collection[tuple[str, str]]
    ) -> list[tuple[tuple[str, ...], str]]:
        """A round's pages that are their clients' last and stay so: tensors and client.

        Args:
            claimed: tensors and clients that the round under way writes anyway.
        """
        found = []
        for one in self.manifests[round].files:
            for client in one.clients:
                names = tuple(
                    name
                    for name in one.tensors
                    if (held := self._pages[name].get(client))
                    and held[-1][0] == round
                    and (name, client) not in claimed
                )
                if names:
                    found.append((names, client))
        return found

    def _take_out(self, round: int, one: Staged, clients: Sequence[str]) -> None:
        for name in one.tensors:
            of_name = self._pages[name]
            for client in clients:
                held = of_name.get(client, [])
                at = bisect_right(held, round, key=_round_of) - 1
                if at < 0 or held[at][0] != round:
                    continue  # void already
                was_last = at == len(held) - 1
                del held[at]
                if was_last:
                    self._last[round] -= 1
                    if held:
                        self._last[held[-1][0]] += 1
                if not held:
                    del of_name[client]


def _round_of(page: Page) -> int:
    return page[0]
