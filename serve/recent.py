"""What was asked for lately, by name, as much as there is room for.

It must not know what it holds, nor how that is made.
"""

from collections import OrderedDict
from typing import Generic, TypeVar

Held = TypeVar("Held")


class Recent(Generic[Held]):
    """A bounded store; who was asked for longest ago leaves first. One thread at a time."""

    def __init__(self, most: int):
        """Args: most: names that are held."""
        self._most = most
        self._held: OrderedDict[str, Held] = OrderedDict()
        """Longest unused first."""

    def __len__(self) -> int:
        return len(self._held)

    def find(self, name: str) -> Held | None:
        """What is held by this name, used now; None: nothing."""
        held = self._held.get(name)
        if held is not None:
            self._held.move_to_end(name)
        return held

    def keep(self, name: str, value: Held) -> Held:
        """Hold it by this name, in place of another."""
        self._held[name] = value
        self._held.move_to_end(name)
        if len(self._held) > self._most:
            self._held.popitem(last=False)
        return value

    def clear(self) -> None:
        """Hold nothing."""
        self._held.clear()
