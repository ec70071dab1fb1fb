"""Rows that crossed the cut before: the server holds them by name, the client knows which it sent.

A row's name is a digest of its bytes, and only the client that sent a row can name it. The server
holds as many bytes as it may, the longest unused go first; losing rows costs their bytes once more
and changes nothing else. It must not know what is computed from a row.

Shapes: N rows of a message, L their tokens, d what a token takes.
"""

from collections import OrderedDict
from dataclasses import replace

import numpy as np

from fellray.platform.messages import Activation, Unheld

KNOWN = 2**20
"""Rows that a client actor remembers having sent; beyond that it begins anew."""


class Recall:
    """The server's side."""

    def __init__(self, budget: int):
        """Args: budget: bytes."""
        self._budget = budget
        self._rows: OrderedDict[tuple[str, bytes], np.ndarray] = OrderedDict()
        self.used = 0
        """Bytes held."""

    def complete(self, activation: Activation) -> Activation:
        """The message with the rows that were left out of it; those that came with it are held.

        Raises:
            Unheld: a row was left out that is not here.
        """
        names, sent_N = activation.names_NB, activation.sent_N
        if names is None or sent_N is None:
            return activation
        keys = _keys(activation)
        lengths = activation.lengths_N
        came = iter(np.split(activation.h_Ld, np.cumsum(lengths[sent_N])[:-1]))
        rows = [
            next(came) if sent else self._rows.get(key)
            for key, sent in zip(keys, sent_N, strict=True)
        ]
        found = [row for row in rows if row is not None]
        if [len(row) for row in found] != lengths.tolist():
            raise Unheld(f"{len(rows) - len(found)} of {len(rows)} rows are not held")
        for key, row in zip(keys, found, strict=True):
            self._put(key, row)
        whole = activation.h_Ld if sent_N.all() else np.concatenate(found)
        return replace(activation, h_Ld=whole, sent_N=np.ones_like(sent_N))

    def drop(self, activation: Activation) -> None:
        """Its rows will not be asked for again."""
        for key in _keys(activation):
            row = self._rows.pop(key, None)
            self.used -= 0 if row is None else row.nbytes

    def clear(self) -> None:
        """Drop all."""
        self._rows.clear()
        self.used = 0

    def _put(self, key: tuple[str, bytes], row: np.ndarray) -> None:
        if key in self._rows:
            self._rows.move_to_end(key)
            return
        if row.nbytes > self._budget:
            return
        while self.used + row.nbytes > self._budget:
            _, oldest = self._rows.popitem(last=False)
            self.used -= oldest.nbytes
        self._rows[key] = row.copy()  # the message itself is not to stay
        self.used += row.nbytes


class Known:
    """The client's side: what it may leave out."""

    def __init__(self) -> None:
        self._rows: set[tuple[str, bytes]] = set()

    def leave_out(self, activation: Activation) -> Activation:
        """The message without the rows that were sent before."""
        if activation.names_NB is None:
            return activation
        return _without(activation, np.array([k not in self._rows for k in _keys(activation)]))

    def add(self, activation: Activation) -> None:
        """Its rows are at the server now."""
        if activation.names_NB is None:
            return
        if len(self._rows) > KNOWN:
            self.forget()
        self._rows.update(_keys(activation))

    def forget(self) -> None:
        """The server may not have them any more."""
        self._rows.clear()


def leave_out_all(activation: Activation) -> Activation:
    """The message with the rows' names alone, where it has any."""
    if activation.names_NB is None:
        return activation
    return _without(activation, np.zeros(len(activation.lengths_N), np.bool_))


def rows_sent(activation: Activation) -> Activation:
    """A message of those rows only that are in it."""
    sent_N = activation.sent_N
    if sent_N is None or sent_N.all():
        return activation
    owners, lengths = activation.row_client_N[sent_N], activation.lengths_N[sent_N]
    return replace(activation, row_client_N=owners, lengths_N=lengths)


def _without(activation: Activation, sent_N: np.ndarray) -> Activation:
    """Args: activation: all its rows are in it."""
    if sent_N.all():
        return activation
    h_Ld = activation.h_Ld[np.repeat(sent_N, activation.lengths_N)]
    return replace(activation, h_Ld=h_Ld, sent_N=sent_N)


def _keys(activation: Activation) -> list[tuple[str, bytes]]:
    names = activation.names_NB
    if names is None:
        return []
    owners = activation.row_client_N.tolist()
    clients = activation.clients
    return [(clients[c], name.tobytes()) for c, name in zip(owners, names, strict=True)]
