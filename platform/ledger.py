"""The ledger: what each client sent and received, by kind, with a digest of every payload.

It counts logical payload where a message is made, independently of the transport, so that the two
can be held against each other. Digests are SHA-256's first 128 bits: processors have instructions
for it, which take half the time of BLAKE2b.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from fellray.platform.messages import Activation, Gradient, LedgerRow

_DIGITS = 32


class Ledger:
    """Entries since the last `close`."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], list[int]] = {}
        self._digests: dict[tuple[str, str], hashlib._Hash] = {}

    def enter(self, client: str, kind: str, payload: np.ndarray, count: int = 1) -> None:
        """One payload of one client, or several that lie side by side."""
        key = (client, kind)
        entry = self._entries.setdefault(key, [0, 0])
        entry[0] += count
        entry[1] += payload.nbytes
        digest = self._digests.setdefault(key, hashlib.sha256())
        digest.update(np.ascontiguousarray(payload).data)

    def enter_each(self, clients: Iterable[str], kind: str, payload: np.ndarray) -> None:
        """The same payload of every client: looked at once."""
        one = hashlib.sha256(np.ascontiguousarray(payload).data)
        for client in clients:
            key = (client, kind)
            if key in self._digests:
                self.enter(client, kind, payload)
            else:
                self._entries[key], self._digests[key] = [1, payload.nbytes], one.copy()

    def enter_rows(self, message: Activation, kind: str, packed_Ld: np.ndarray) -> None:
        """A packed tensor, each client's rows under its own name, in the order of the rows."""
        owners, bounds = message.row_client_N, np.cumsum([0, *message.lengths_N])
        if not len(owners):
            return
        # neighbours of one client are one stretch of bytes
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        for row, end in zip(starts, [*starts[1:], len(owners)], strict=True):
            stretch = packed_Ld[bounds[row] : bounds[end]]
            self.enter(message.clients[owners[row]], kind, stretch, int(end - row))

    def enter_envelope(self, message: Activation) -> None:
        """Lengths and row owners; names, and which rows are there, where rows are named."""
        for c, client in enumerate(message.clients):
            rows = message.row_client_N == c
            if rows.any():
                envelope = np.stack([message.row_client_N[rows] * 0, message.lengths_N[rows]])
                self.enter(client, "envelope", envelope)
                for more in (message.names_NB, message.sent_N):
                    if more is not None:
                        self.enter(client, "envelope", more[rows], 0)

    def enter_places(self, message: Activation, *places_N: np.ndarray) -> None:
        """More of the envelope: whole numbers of every row."""
        for c, client in enumerate(message.clients):
            rows = message.row_client_N == c
            if rows.any():
                self.enter(client, "envelope", np.stack([places[rows] for places in places_N]))

    def void(self) -> None:
        """What was entered belongs to a round that is begun again: a kind of its own."""
        for client in {client for client, _ in self._entries}:
            kinds = sorted(kind for owner, kind in self._entries if owner == client)
            entries = [self._entries.pop((client, kind)) for kind in kinds]
            digests = [self._digests.pop((client, kind)).digest() for kind in kinds]
            self._entries[client, "replayed"] = [
                sum(e[0] for e in entries),
                sum(e[1] for e in entries),
            ]
            self._digests[client, "replayed"] = hashlib.sha256(b"".join(digests))

    def close(self) -> list[LedgerRow]:
        """All entries, sorted, and a new page."""
        rows = [
            LedgerRow(client, kind, messages, size, digest.hexdigest()[:_DIGITS])
            for (client, kind), digest in sorted(self._digests.items(), key=lambda item: item[0])
            for messages, size in [self._entries[client, kind]]
        ]
        self._entries, self._digests = {}, {}
        return rows


def total(rows: Iterable[LedgerRow]) -> dict[str, int]:
    """Bytes by kind."""
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[row.kind] = kinds.get(row.kind, 0) + row.bytes
    return kinds


def payload_bytes(*messages: Activation | Gradient | np.ndarray) -> int:
    """What a transport counts: the bytes of every array in the messages."""
    arrays: list[np.ndarray] = []
    for message in messages:
        if isinstance(message, np.ndarray):
            arrays.append(message)
        else:
            arrays += [v for v in vars(message).values() if isinstance(v, np.ndarray)]
    return sum(array.nbytes for array in arrays)
