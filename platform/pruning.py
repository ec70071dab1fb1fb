"""Pruning: which old rounds go, and which of their pages are carried on so that they can.

Where clients are sampled from many, rounds that were given up stay for a few clients who were not
asked since. It must not know how pages are read or written.
"""

from collections.abc import Collection, Iterator, Sequence
from heapq import nsmallest

from fellray.platform.manifest import Staged
from fellray.platform.page_index import PageIndex
from fellray.platform.shelf import Shelf, folder
from fellray.platform.storage import Storage

SPARE = 64
"""Rounds that were given up may be as many before their last pages are carried on."""
CARRIED = "carried"
"""Files whose pages are an older state than their round's are called `carried-0` and so on."""


def prune(storage: Storage, shelf: Shelf, index: PageIndex, kept: Sequence[int]) -> Iterator[int]:
    """Give up or delete the rounds before the last of those kept; yields those deleted."""
    needed = []
    for number in shelf.numbers():
        if number in kept:
            storage.sweep(folder(number))
        elif number < kept[-1]:
            if index.is_needed(number, kept):
                needed.append(number)
                continue
            shelf.delete(number)
            index.leave(number)
            yield number
    # what is deleted makes room for what is written
    for number in needed:
        shelf.give_up(number)


def choose(
    given_up: Collection[int], index: PageIndex, since: int, staged: Sequence[Staged]
) -> dict[tuple[str, ...], list[str]]:
    """Which pages to write once more: tensors -> clients.

    From `SPARE` rounds that were given up on, those of the emptiest after round `since`, at most as
    many pages as the round under way has anyway.
    """
    wanted: dict[tuple[str, ...], list[str]] = {}
    if len(given_up) <= SPARE:
        return wanted
    claimed = {(name, c) for one in staged for name in one.tensors for c in one.clients}
    room = len(claimed)
    old = [n for n in given_up if n > since and index.count_last(n)]
    for number in nsmallest(len(claimed), old, key=index.count_last):
        rest = index.rest(number, claimed)
        room -= sum(len(names) for names, _ in rest)
        if room < 0:
            break
        for names, client in rest:
            wanted.setdefault(names, []).append(client)
    return wanted
