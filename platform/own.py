"""What clients have of their own: rank, histories a round and cut, read from a Parquet or CSV file.

It must not know how adapters are cut to a rank, nor how histories are drawn.

Letters: M rows of the file.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.privacy_config import NoPrivacy
from fellray.platform.shards import Dataset
from fellray.platform.tables import find_delimiter

_LOWEST = {"rank": 1, "local_samples": 1, "cut": 0}
_SETTINGS = tuple(_LOWEST)
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Own:
    """Settings of those who differ from the run's."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    """Learner -> rank of its adapters."""
    local_samples: Mapping[str, int] = field(default_factory=dict)
    """Client -> histories of it that are read in a round."""
    cuts: Mapping[str, int] = field(default_factory=dict)
    """Learner -> its cut; of all learners, where anybody's is its own."""

    def ranks_of(self, learners: Iterable[str], largest: int) -> list[int]:
        """Their ranks; that of the run where none is their own."""
        return [self.ranks.get(learner, largest) for learner in learners]

    def cuts_of(self, learners: Sequence[str]) -> list[int]:
        """Their cuts, where there are any; who is no learner has the largest."""
        found = [self.cuts.get(learner, -1) for learner in learners]
        if -1 not in found:
            return found
        largest = max(self.cuts.values())
        return [largest if cut < 0 else cut for cut in found]

    def settle(self, config: RunConfig) -> RunConfig:
        """The config with `model.cuts`, as these clients have them."""
        cuts = (min(self.cuts.values()), max(self.cuts.values())) if self.cuts else None
        return config.model_copy(update={"model": config.model.model_copy(update={"cuts": cuts})})

    def samples_of(self, clients: Iterable[str], usual: int) -> int:
        """What is read of all of them together in a round."""
        return sum(self.local_samples.get(client, usual) for client in clients)

    def select(self, names: Collection[str]) -> "Own":
        """What the named ones have."""
        return Own(
            {name: self.ranks[name] for name in names if name in self.ranks},
            {name: self.local_samples[name] for name in names if name in self.local_samples},
            {name: self.cuts[name] for name in names if name in self.cuts},
        )

    def tree(self) -> dict[str, dict[str, int]]:
        """For JSON; `Own(**tree)` is the same again."""
        return {
            "ranks": dict(self.ranks),
            "local_samples": dict(self.local_samples),
            "cuts": dict(self.cuts),
        }


ALIKE = Own()
"""Nobody differs."""


def read_own(config: RunConfig) -> Own:
    """What the file `clients.own` says; rank and cut are for a learner who reads one client's data.

    Raises:
        FellrayError: the file is missing, unreadable or empty, a column is missing or unknown, a
            client is missing, unknown or named twice, a value is no whole number (of 1 or more, a
            cut may be 0), a rank is above `model.lora.r`, there are cuts and `train.share` is
            trunk_only or `model.freeze_bottom` set, or there are ranks and the method has control
            variates; or the data is not prepared.
    """
    path = config.clients.own
    if path is None:
        return ALIKE
    table = _read(path)
    _check_columns(path, table.column_names)
    if not table.num_rows:
        raise FellrayError(f"{path}: has no rows; name a client in it, or leave clients.own out")
    registered = Dataset(config.data.path).clients
    clients = _check_clients(path, table["client"], registered)
    found = {
        name: _check_numbers(path, name, table[name], clients)
        for name in _SETTINGS
        if name in table.column_names
    }
    largest = config.model.lora.r
    for at, (client, rank) in enumerate(zip(clients, found.get("rank", []), strict=False)):
        if rank is not None and rank > largest:
            raise FellrayError(
                f"{path}: rank {rank} of client {client!r} (row {at + 1}) is larger than "
                f"model.lora.r={largest}, at which all adapters are stacked; lower it, or set "
                f"model.lora.r={max(r or 0 for r in found['rank'])}"
            )
    seats = config.method.seat(registered)
    own = {
        name: {c: v for c, v in zip(clients, values, strict=True) if v is not None}
        for name, values in found.items()
    }
    ranks, cuts = (
        {c: value for c, value in own.get(name, {}).items() if seats.get(c) == (c,)}
        for name in ("rank", "cut")
    )
    if ranks and config.method.mixes_products():
        raise FellrayError(
            f"{path}: rank is each client's own, and method.kind={config.method.kind} mixes or "
            "compares products of A and B, which needs one; leave the column out, or take another "
            "method"
        )
    if (ranks or cuts) and not isinstance(config.privacy, NoPrivacy):
        raise FellrayError(
            f"{path}: rank or cut is each client's own, and privacy.kind={config.privacy.kind} "
            "puts noise on whole updates, also where such a client has nothing; leave the columns "
            "out, or privacy"
        )
    if cuts and config.train.share == "trunk_only":
        raise FellrayError(
            f"{path}: cut is each client's own, and train.share=trunk_only mixes what the server "
            "holds of everybody, which then differs; set train.share to all or none, or leave the "
            "column out"
        )
    if ranks and config.method.local().controls:
        raise FellrayError(
            f"{path}: rank is each client's own, and method.kind={config.method.kind} compares the "
            "steps of all clients column by column; leave the column out, or take another method"
        )
    if cuts and config.model.freeze_bottom:
        raise FellrayError(
            f"{path}: cut is each client's own, and with model.freeze_bottom a block would be "
            "trained for some and frozen for others; set model.freeze_bottom=false, or leave the "
            "column out"
        )
    if cuts:
        cuts = {learner: cuts.get(learner, config.model.cut) for learner in seats}
    return Own(ranks, own.get("local_samples", {}), cuts)


def check_cuts(config: RunConfig, own: Own, num_blocks: int) -> None:
    """Refuse cuts that leave a client no block at the server.

    Raises:
        FellrayError: that is so.
    """
    most = num_blocks - 1 - config.model.top
    for client, cut in own.cuts.items():
        if cut > most:
            raise FellrayError(
                f"{config.clients.own}: cut {cut} of client {client!r}: {config.model.name} has "
                f"{num_blocks} blocks, of which model.top={config.model.top} are the top and the "
                f"trunk needs at least one; write 0 to {most}"
            )


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix in (".parquet", ".pq"):
            return pq.read_table(path)
        if path.suffix not in (".csv", ".tsv"):
            raise FellrayError(
                f"clients.own={path}: must end in .parquet, .pq, .csv or .tsv"
                + ("" if path.exists() else "; it does not exist")
            )
        parse = pyarrow.csv.ParseOptions(delimiter=find_delimiter(path))
        # ids and numbers as they are written: what a number is is said here, with its row
        text = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(("client", *_SETTINGS), pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        )
        return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=text)
    except FileNotFoundError:
        raise FellrayError(f"{path}: does not exist; check clients.own") from None
    except (pa.ArrowException, OSError) as error:
        raise FellrayError(
            f"{path}: cannot be read ({error}); clients.own takes a whole Parquet file, or a UTF-8 "
            "CSV file with a header, as its name says"
        ) from None


def _check_columns(path: Path, names: Sequence[str]) -> None:
    told = f"it has {', '.join(names)}; clients.own takes client, {', '.join(_SETTINGS)}"
    if names.count("client") != 1:
        raise FellrayError(f"{path}: needs one column 'client'; {told}")
    others = [name for name in names if name != "client"]
    if not others:
        raise FellrayError(f"{path}: says nothing about its clients; {told}")
    for name in others:
        if name not in _SETTINGS:
            raise FellrayError(f"{path}: unknown column {name!r}; {told}")
        if others.count(name) > 1:
            raise FellrayError(f"{path}: has the column {name!r} twice; {told}")


def _check_clients(path: Path, column: pa.ChunkedArray, registered: Collection[str]) -> list[str]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        at = pc.index(column.is_null(), True).as_py()
        raise FellrayError(f"{path}: client is empty in row {at + 1}; name it or remove the row")
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise FellrayError(
            f"{path}: client is of type {column.type}; it must be text, as in the prepared data"
        )
    clients: list[str] = column.to_pylist()
    known, row_of = set(registered), dict[str, int]()
    for row, client in enumerate(clients, 1):
        if client not in known:
            raise FellrayError(
                f"{path}: client {client!r} (row {row}) is not among the {len(known)} clients of "
                "this run; remove the row, or name the client as `fellray prepare` does"
            )
        if client in row_of:
            raise FellrayError(
                f"{path}: client {client!r} is named in row {row_of[client]} and in row {row}; "
                "remove one"
            )
        row_of[client] = row
    return clients


def _check_numbers(
    path: Path, name: str, column: pa.ChunkedArray, clients: Sequence[str]
) -> list[int | None]:
    """Whole numbers of the lowest or more, None where empty."""
    lowest = _LOWEST[name]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        written = pc.utf8_trim_whitespace(column)
        empty_M = pc.equal(written, "").fill_null(True)
        # a column with empty cells comes out of many programs as 4.0
        fits_M = pc.match_substring_regex(written, r"^[0-9]{1,10}(\.0+)?$").fill_null(False)
        number_M = pc.if_else(fits_M, written, None).cast(pa.float64())
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        number_M = column.cast(pa.float64(), safe=False)
        empty_M = pc.is_null(number_M, nan_is_null=True)
    elif pa.types.is_null(column.type):
        return [None] * len(column)
    else:
        raise FellrayError(
            f"{path}: {name} is of type {column.type}; it must hold whole numbers of {lowest} or "
            "more"
        )
    empty = np.asarray(empty_M.to_numpy(), bool)
    number = np.where(empty, 1.0, number_M.fill_null(np.nan).to_numpy())
    wrong = ~((number == np.floor(number)) & (number >= lowest) & (number <= _MOST))
    if wrong.any():
        row = int(wrong.argmax())
        raise FellrayError(
            f"{path}: {name} of client {clients[row]!r} (row {row + 1}) is "
            f"{column[row].as_py()!r}; write a whole number of {lowest} or more, or leave it empty "
            "for the run's"
        )
    whole = number.astype(np.int64).tolist()
    return [None if none else value for none, value in zip(empty.tolist(), whole, strict=True)]
