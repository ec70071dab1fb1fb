"""What forward passes leave for their backward, within a budget of bytes; what is dropped is made
again.

Kept or made again: the same numbers, because a lane's do not depend on who shared its batch. So a
backward may come for any part of a forward's lanes, or for lanes of several forwards at once.

Shapes: M tokens of all lanes, d width.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fellray.platform.lanes import Lanes
from fellray.platform.packed import Saved


@dataclass(eq=False)
class _Pass:
    """One forward pass; its memory is one block, gone when the last of its lanes is."""

    saved: Sequence[Saved]
    left: set[Hashable]
    size: int


@dataclass(frozen=True)
class _Lane:
    owner: _Pass
    start: int
    stop: int


class Keep:
    """Forward passes that wait for their backward, the oldest dropped first."""

    def __init__(self, budget: int):
        """Args: budget: bytes, 0 keeps nothing."""
        self._budget = budget
        self._passes: list[_Pass] = []
        self._lanes: dict[Hashable, _Lane] = {}
        self.used = 0
        """Bytes held."""

    def make_room(self, size: int) -> bool:
        """Drop the oldest until `size` bytes fit; False where they never do."""
        if size > self._budget:
            return False
        while self.used + size > self._budget:
            self._drop(self._passes[0])
        return True

    def put(self, keys: Sequence[Hashable], lanes: Lanes, saved: Sequence[Saved]) -> None:
        """Keep a pass that there is room for; one key for each lane, in the order of `lanes`."""
        for key in keys:  # the same step once more: the newer pass counts
            self._forget(key)
        own = _Pass(saved, set(keys), measure(saved))
        for key, (start, stop) in zip(keys, lanes.spans(), strict=True):
            self._lanes[key] = _Lane(own, start, stop)
        self._passes.append(own)
        self.used += own.size

    def take(self, keys: Sequence[Hashable], lanes: Lanes, h_Md: Tensor) -> list[Saved] | None:
        """What was kept of these lanes, and no longer is; None if one is missing or had another
        input than `h_Md`."""
        held = [self._lanes.get(key) for key in keys]
        found = [lane for lane in held if lane is not None]
        saved = _join(found, lanes) if len(found) == len(keys) else None
        for key in keys:
            self._forget(key)
        return saved if saved and torch.equal(_inputs(saved), h_Md) else None

    def clear(self) -> None:
        """Drop all."""
        self._passes.clear()
        self._lanes.clear()
        self.used = 0

    def _forget(self, key: Hashable) -> None:
        lane = self._lanes.pop(key, None)
        if lane is None:
            return
        lane.owner.left.discard(key)
        if not lane.owner.left:
            self._drop(lane.owner)

    def _drop(self, one: _Pass) -> None:
        for key in one.left:
            del self._lanes[key]
        self._passes.remove(one)
        self.used -= one.size


def measure(saved: Sequence[Saved]) -> int:
    """Bytes of a pass."""
    return sum(tensor.nbytes for block in saved for tensor in _tensors(block))


def _inputs(saved: Sequence[Saved]) -> Tensor:
    """What each lane entered with: at a block, those behind the ones that were in before."""
    entered, parts = 0, []
    for block in saved:
        parts.append(block.x_Md[entered:])
        entered = len(block.x_Md)
    return saved[0].x_Md if len(saved[0].x_Md) == entered else torch.cat(parts)


def _join(found: Sequence[_Lane], lanes: Lanes) -> list[Saved] | None:
    """The lanes' tokens side by side; without a copy where they are a whole pass as it lies."""
    spans = lanes.spans()
    sizes = [stop - start for start, stop in spans]
    if sizes != [lane.stop - lane.start for lane in found]:
        return None
    first = found[0].owner
    if all(lane.owner is first for lane in found):
        whole = len(first.saved[-1].x_Md) == lanes.num_tokens  # where all are in
        if whole and [(lane.start, lane.stop) for lane in found] == spans:
            return list(first.saved)
    blocks = zip(*(lane.owner.saved for lane in found), strict=True)
    return [
        Saved(
            *(
                torch.cat([t[lane.start : lane.stop] for t, lane in zip(parts, found, strict=True)])
                for parts in zip(*(_tensors(block) for block in block_of), strict=True)
            )
        )
        for block_of in blocks
    ]


def _tensors(saved: Saved) -> list[Tensor]:
    return [getattr(saved, field.name) for field in fields(saved)]
