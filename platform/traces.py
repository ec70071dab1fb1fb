"""A trace: which clients are available in which rounds, read from a Parquet file.

Time is counted in rounds, not seconds: who is available is then a property of the round, and a
replay on a slower machine finds the same clients. It must not know how many are wanted, or whether
a client is still registered.

A segment tree over the moments at which anybody comes or goes answers "who is there": an interval
lies in at most two nodes a level, a round's clients are those of the nodes above its leaf.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fellray.platform.errors import FellrayError

_COLUMNS = ("client", "start", "end")


class Trace:
    """Half-open intervals [start, end) of rounds, indexed by round."""

    def __init__(self, path: Path, known: Collection[str]):
        """Reads the whole file; `known`: every client that may ever register.

        Raises:
            FellrayError: the file is missing, unreadable or empty, a column is missing, null or of
                the wrong type, an interval is empty, or a client is unknown.
        """
        self.path = path
        table = _read(path, known)
        self.clients: pa.Array = pc.unique(table["client"])
        """The clients that occur, in the order of their numbers."""
        client_N, start_N, end_N = _merge(
            pc.index_in(table["client"], value_set=self.clients).to_numpy().astype(np.int64),
            table["start"].to_numpy(),
            table["end"].to_numpy(),
        )
        self._moments = np.unique(np.concatenate([start_N, end_N]))
        leaves = len(self._moments)
        low = leaves + np.searchsorted(self._moments, start_N)
        high = leaves + np.searchsorted(self._moments, end_N)
        nodes, held = [], []
        while (low < high).any():
            for chosen, node in (
                ((low < high) & (low % 2 == 1), low),
                ((low < high) & (high % 2 == 1), high - 1),
            ):
                nodes.append(node[chosen])
                held.append(client_N[chosen])
            low, high = (low + 1) // 2, high // 2
        node = np.concatenate(nodes)
        self._held = np.concatenate(held)[np.argsort(node, kind="stable")]
        self._offsets = np.cumsum([0, *np.bincount(node, minlength=2 * leaves)])

    def available(self, round: int) -> np.ndarray:
        """int64 numbers (into `clients`) of those available in a round, each once, unsorted.

        O(log of the number of distinct moments + answer).
        """
        leaf = int(np.searchsorted(self._moments, round, side="right")) - 1
        if leaf < 0:
            return self._held[:0]
        node, parts = leaf + len(self._moments), []
        while node:
            parts.append(self._held[self._offsets[node] : self._offsets[node + 1]])
            node //= 2
        return np.concatenate(parts)


def _merge(
    client_N: np.ndarray, start_N: np.ndarray, end_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same time as intervals of which a client's own never overlap, so it is found once."""
    order = np.lexsort((start_N, client_N))
    client_N, start_N, end_N = client_N[order], start_N[order], end_N[order]
    fresh = np.r_[True, client_N[1:] != client_N[:-1]]
    # the latest end so far of the same client: ranks of (client, end) grow from client to client
    rank = np.empty(len(end_N), np.int64)
    by_end = np.lexsort((end_N, client_N))
    rank[by_end] = np.arange(len(by_end))
    latest_N = end_N[by_end[np.maximum.accumulate(rank)]]
    fresh[1:] |= start_N[1:] > latest_N[:-1]
    first = np.flatnonzero(fresh)
    last = np.append(first[1:], len(fresh)) - 1
    return client_N[first], start_N[first], latest_N[last]


def _read(path: Path, known: Collection[str]) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise FellrayError(f"{path}: does not exist; check sampling.trace") from None
    except (pa.ArrowException, OSError) as error:
        raise FellrayError(
            f"{path}: cannot be read ({error}); sampling.trace takes a whole Parquet file"
        ) from None
    for name in _COLUMNS:
        if table.column_names.count(name) != 1:
            raise FellrayError(
                f"{path}: needs one column {name!r}; it has {', '.join(table.column_names)}; a "
                f"trace has the columns {', '.join(_COLUMNS)}"
            )
    if not table.num_rows:
        raise FellrayError(
            f"{path}: has no rows; write one row per client and interval, or leave sampling.trace "
            "and sampling.kind=trace out"
        )
    columns = {name: _check_column(path, name, table[name]) for name in _COLUMNS}
    empty = pc.greater_equal(columns["start"], columns["end"])
    if pc.any(empty).as_py():
        row = pa.table(columns).filter(empty).slice(0, 1).to_pylist()[0]
        raise FellrayError(
            f"{path}: start must be below end, but client {row['client']!r} has start "
            f"{row['start']}, end {row['end']} ({pc.sum(empty).as_py()} such rows); end is the "
            "first round in which it is gone"
        )
    occurring = pc.unique(columns["client"])
    unknown = set(occurring.to_pylist()).difference(known)
    if unknown:
        some = ", ".join(map(repr, sorted(unknown)[:3]))
        raise FellrayError(
            f"{path}: client {some} ({len(unknown)} in all) is not among the {len(known)} clients "
            "of this run; remove these rows, or name the clients as `fellray prepare` does"
        )
    return pa.table(columns)


def _check_column(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        raise FellrayError(
            f"{path}: {name} is null in {column.null_count} of {len(column)} rows; remove them"
        )
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if name == "client" and not text:
        raise FellrayError(
            f"{path}: client is of type {column.type}; it must be text, as in the prepared data"
        )
    if name != "client" and not pa.types.is_integer(column.type):
        raise FellrayError(
            f"{path}: {name} is of type {column.type}; it must hold round numbers (whole numbers)"
        )
    try:
        return column.cast(pa.string() if name == "client" else pa.int64())
    except pa.ArrowInvalid as error:
        raise FellrayError(f"{path}: {name} does not fit int64 ({error}); lower it") from None
