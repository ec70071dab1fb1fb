"""Tables: what a source comes to, and how Parquet and separated text are read into it.

It must not know which form a source has, nor what the values are worth.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from fellray.platform.errors import FellrayError

TimestampKind = Literal["unix_seconds", "order_only"]
"""Moments in time, or only the order of one user's rows."""


@dataclass(frozen=True)
class Source:
    """Tables under fellray's column names, and the files to name in an error."""

    rows: pa.Table
    items: pa.Table
    kind: TimestampKind
    rows_file: str
    items_file: str
    users: pa.Table | None = None
    """`user_id` and a column for each attribute, where the source says anything of its users."""
    users_file: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many of what the reader did not take; empty where it took everything."""


def find_delimiter(file: Path) -> str:
    """What separates the columns of a `.csv` or `.tsv` file, by its first line.

    Raises:
        OSError: the file cannot be read.
    """
    if file.suffix == ".tsv":
        return "\t"
    with file.open("rb") as opened:
        header = re.sub(rb'"[^"]*"', b"", opened.readline(1 << 20))
    return max((",", ";", "\t", "|"), key=lambda mark: header.count(mark.encode()))


def read_table(
    file: Path,
    delimiter: str | None = None,
    names: list[str] | None = None,
    encoding: str = "utf8",
    quoted: bool = True,
    text: Sequence[str] = (),
) -> pa.Table:
    """A whole Parquet or CSV file; with a delimiter given, a separated file without a header.

    Raises:
        FellrayError: it is missing, damaged, or neither Parquet nor CSV.
    """
    try:
        if delimiter is None and file.suffix in (".parquet", ".pq"):
            return pq.read_table(file)
        if delimiter is None and file.suffix not in (".csv", ".tsv"):
            raise FellrayError(
                f"data.source={file}: is neither 'demo', nor a folder, nor a file ending in "
                ".parquet, .pq, .csv or .tsv (tables), .inter (RecBole) or .json, .jsonl, .json.gz "
                "or .jsonl.gz (Amazon reviews)" + ("" if file.exists() else "; it does not exist")
            )
        # One block, so that a column's type is found from all of it, not from its first megabyte.
        block = min(max(file.stat().st_size + 1, 1 << 20), 1 << 30)
        return pyarrow.csv.read_csv(
            file,
            pyarrow.csv.ReadOptions(
                block_size=block,
                encoding=encoding,
                column_names=names,
                autogenerate_column_names=delimiter is not None and names is None,
            ),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter or find_delimiter(file),
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
            ),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(text, pa.string())),
        )
    except FileNotFoundError:
        raise missing(file) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise FellrayError(
            f"{file}: cannot be read ({error}); it must be whole, and Parquet or UTF-8 CSV with "
            "a header, as its name says"
        ) from None


def read_typed(
    file: Path,
    types: Mapping[str, pa.DataType],
    delimiter: str,
    form: str,
    quoted: bool = False,
    raw: bytes | None = None,
) -> pa.Table:
    """Columns of known names and types: block by block on all threads, nothing is guessed.

    Args:
        types: column -> type, those to take from a file with a header; all, in their order, of
            one without.
        form: what the file should be, for an error.
        quoted: whether a cell may stand between quotes (a line feed in it is refused).
        raw: the bytes of a file without a header, in UTF-8.

    Raises:
        FellrayError: the file is missing or empty, has no such column, or a row does not fit;
            the row is named.
    """
    for threads in (True, False):
        try:
            return pyarrow.csv.read_csv(
                file if raw is None else pa.BufferReader(raw),
                pyarrow.csv.ReadOptions(
                    use_threads=threads, column_names=None if raw is None else list(types)
                ),
                pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False),
                pyarrow.csv.ConvertOptions(column_types=types, include_columns=list(types)),
            )
        except FileNotFoundError:
            raise missing(file) from None
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            if threads:  # one thread alone knows in which row it was
                continue
            told = str(error).removesuffix("in CSV file")
            raise FellrayError(f"{file}: is not {form} ({told}); take the original file") from None
    raise AssertionError("unreachable")


def missing(file: Path) -> FellrayError:
    """The error of a file that is not there."""
    return FellrayError(f"{file}: does not exist; check data.source, data.items and data.users")


def pick(
    table: pa.Table,
    file: Path,
    required: Sequence[str],
    optional: Sequence[str],
    names: Mapping[str, str],
    hint: str,
) -> pa.Table:
    """The columns under fellray's names; an optional one that the config names is required.

    Raises:
        FellrayError: a required column is not there, or is there twice.
    """
    picked = {}
    for key in (*required, *optional):
        name = names.get(key, key)
        count = table.column_names.count(name)
        if count == 1:
            picked[key] = table[name]
        elif key in required or key in names:
            raise FellrayError(
                f"{file}: {count or 'no'} column{'s are' if count else ' is'} called {name!r} "
                f"({key}), one must be; it has {', '.join(table.column_names)}" + hint.format(key)
            )
    return pa.table(picked)


def pick_users(table: pa.Table, file: Path, names: Mapping[str, str]) -> pa.Table:
    """Users by `user_id`, the other columns as they are: their attributes.

    Raises:
        FellrayError: there is no `user_id`, or a column is there twice.
    """
    # The file may call its ids as the interactions do, or as fellray does.
    name = names.get("user_id", "user_id")
    name = name if name in table.column_names else "user_id"
    attributes = [column for column in table.column_names if column not in ("user_id", name)]
    hint = "; call the column of the users' ids user_id, and every other by a name of its own"
    return pick(table, file, ("user_id", *attributes), (), {"user_id": name}, hint)


def first_titled(items: pa.Table) -> pa.Table:
    """Each item's first row that has a title, or its first row where none has."""
    number = np.arange(items.num_rows)
    if pa.types.is_string(items["title"].type):
        number = number + items.num_rows * _blank(items["title"]).to_numpy()
    numbered = items.append_column("row", pa.array(number))
    first = numbered.group_by("item_id").aggregate([("row", "min")])["row_min"].to_numpy()
    return items.take(pa.array(np.sort(first % max(1, items.num_rows))))


def drop_untitled(
    rows: pa.Table, rows_file: Path, items: pa.Table, items_file: Path
) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """Interactions and items that a model can read, and how much that leaves out.

    The model reads titles, so an item without one (or without any row in `items`) can be neither
    read nor recommended: it is left out, and its interactions with it.

    Returns:
        Interactions, items, and counts: `items_without_metadata` and `items_without_title` that
        were met by somebody, and their `interactions`; nothing where there are none.

    Raises:
        FellrayError: nothing would be left.
    """
    titled = items.filter(pc.invert(_blank(items["title"])))
    known = pc.is_in(rows["item_id"], value_set=titled["item_id"].combine_chunks())
    lost = pc.unique(rows["item_id"].filter(pc.invert(known)))
    if not len(lost):
        return rows, titled, {}
    untitled = pc.sum(pc.is_in(lost, value_set=items["item_id"].combine_chunks())).as_py()
    kept = rows.filter(known)
    if not kept.num_rows:
        raise FellrayError(
            f"{rows_file}: none of its {len(lost):,} items has a title in {items_file}; do the two "
            "files belong together?"
        )
    counts = {
        "items_without_metadata": len(lost) - untitled,
        "items_without_title": untitled,
        "interactions": rows.num_rows - kept.num_rows,
    }
    return kept, titled, counts


def _blank(title: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.equal(pc.utf8_trim_whitespace(title.fill_null("")), "")
