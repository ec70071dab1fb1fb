"""A look at a cluster's nodes every so often: when they came, when they went, and for how long."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

from fellray.actors.session import ray
from fellray.platform.errors import FellrayError

EVERY_S = 0.25
"""Seconds between two looks."""


class NodeWatch:
    """Watches from when it is entered until it is left."""

    def __init__(self) -> None:
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.began = time.time()
        self.changes: list[tuple[float, Counter[str]]] = [(self.began, count_nodes())]
        """From when on there were how many nodes of each kind: `time.time()`, kind -> count."""
        self._failed: Exception | None = None
        """Why nobody looks any more."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def await_count(self, nodes: int, seconds: float) -> float | None:
        """Seconds until no more than so many nodes are left; None: they did not go in time.

        Raises:
            FellrayError: the cluster does not say any more which nodes it has.
        """
        began = time.monotonic()
        while (waited := time.monotonic() - began) < seconds:
            self._check()
            if self.changes[-1][1].total() <= nodes:
                return waited
            time.sleep(EVERY_S)
        return None

    def reached(self, nodes: int) -> float | None:
        """When there were so many for the first time: `time.time()`."""
        return next((at for at, kinds in self.changes if kinds.total() >= nodes), None)

    def seconds(self, start: float, end: float) -> dict[str, float]:
        """Node-seconds of each kind between two readings of `time.time()`.

        Raises:
            FellrayError: as `await_count`.
        """
        self._check()
        spent: dict[str, float] = {}
        ends = [at for at, _ in self.changes[1:]] + [max(end, self.changes[-1][0])]
        for (at, kinds), until in zip(self.changes, ends, strict=True):
            lasted = max(0.0, min(until, end) - max(at, start))
            for kind, count in kinds.items():
                spent[kind] = spent.get(kind, 0.0) + count * lasted
        return spent

    def _watch(self) -> None:
        while not self._left.wait(EVERY_S):
            try:
                now = count_nodes()
            except Exception as error:  # in a thread nobody would hear of it
                self._failed = error
                return
            if now != self.changes[-1][1]:
                self.changes.append((time.time(), now))

    def _check(self) -> None:
        if self._failed is not None:
            raise FellrayError(
                f"the cluster does not say any more which nodes it has ({self._failed}): see "
                "whether its head is still there, and measure again"
            )


def count_nodes() -> Counter[str]:
    """Living nodes of each kind."""
    return Counter(name_kind(node) for node in ray.nodes() if node["Alive"])


def name_kind(node: Mapping[str, Any]) -> str:
    """What cluster.yaml calls it; a node that nobody named is a head or a client node."""
    unnamed = "head" if "node:__internal_head__" in node["Resources"] else "client"
    kind: str = (node.get("Labels") or {}).get("fellray", unnamed)
    return kind
