"""Sources: what each form that people have is opened as, under fellray's column names.

The demo, a folder in fellray's schema, MovieLens ml-100k, one Parquet or CSV file. It must not know
what the values are worth: columns are found and named here, and checked in `interactions`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from fellray.platform import demo
from fellray.platform.config import DataConfig
from fellray.platform.errors import FellrayError

TimestampKind = Literal["unix_seconds", "order_only"]
"""Moments in time, or only the order of one user's rows."""

_COLUMNS = ("user_id", "item_id", "title", "timestamp", "rating", "categories")
# The genre flags of ml-100k's u.item, in the order of its columns.
_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


@dataclass(frozen=True)
class Source:
    """Two tables under fellray's column names, and the files to name in an error."""

    rows: pa.Table
    items: pa.Table
    kind: TimestampKind
    rows_file: str
    items_file: str


def open_source(config: DataConfig) -> Source:
    """What `config.source` names: `demo`, a folder or a file.

    Raises:
        FellrayError: a file is missing or unreadable, a column is missing, or the source is of no
            known form.
    """
    source = Path(config.source)
    is_file = config.source != "demo" and not source.is_dir()
    if not is_file and (config.columns or config.items is not None):
        raise FellrayError(
            f"data.source={config.source}: data.columns and data.items belong to a Parquet or CSV "
            "file; leave them out, or give the file itself as data.source"
        )
    if config.source == "demo":
        rows, items = demo.make(config.seed)
        return Source(rows, items, "unix_seconds", "demo", "demo")
    if is_file:
        return _open_file(source, config)
    if (source / "u.data").is_file():
        return _open_movielens(source)
    if (source / "interactions.parquet").is_file():
        return _open_folder(source)
    raise FellrayError(
        f"{source}: a folder given as data.source holds interactions.parquet and items.parquet "
        "(fellray's schema) or u.data and u.item (MovieLens ml-100k); neither is there"
    )


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


def _open_folder(folder: Path) -> Source:
    rows_file, items_file = folder / "interactions.parquet", folder / "items.parquet"
    hint = (
        "; a folder needs fellray's own names. For other names give the file as data.source "
        "with data.columns.{0}=<column>"
    )
    raw = _read_table(rows_file)
    rows = _pick(raw, rows_file, ("user_id", "item_id", "timestamp", "seq"), ("rating",), {}, hint)
    items = _pick(
        _read_table(items_file), items_file, ("item_id", "title"), ("categories",), {}, hint
    )
    kind = ((raw.schema.metadata or {}).get(b"timestamp_kind") or b"").decode()
    if not kind:
        kind = _kind_from_meta(folder / "meta.json")
    kind = kind.replace(" ", "_")
    if kind == "unix_seconds":
        return Source(rows, items, "unix_seconds", str(rows_file), str(items_file))
    if kind == "order_only":
        return Source(rows, items, "order_only", str(rows_file), str(items_file))
    raise FellrayError(
        f"{rows_file}: timestamp_kind is {kind!r}; write 'unix_seconds' or 'order_only' into the "
        f"Parquet file's metadata or into {folder / 'meta.json'} under that key"
    )


def _kind_from_meta(file: Path) -> str:
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise FellrayError(f"{file}: is not readable JSON ({error}); mend or remove it") from None
    return str(meta.get("timestamp_kind", "")) if isinstance(meta, dict) else ""


def _open_movielens(folder: Path) -> Source:
    rows_file, items_file = folder / "u.data", folder / "u.item"
    rows = _read_table(
        rows_file, delimiter="\t", names=["user_id", "item_id", "rating", "timestamp"]
    )
    raw = _read_table(items_file, delimiter="|", encoding="latin-1", quoted=False)
    if raw.num_columns != 5 + len(_GENRES):
        raise FellrayError(
            f"{items_file}: has {raw.num_columns} columns separated by '|', ml-100k's has "
            f"{5 + len(_GENRES)}; take the original file"
        )
    flags = np.stack([raw[5 + g].to_numpy() for g in range(len(_GENRES))], axis=1)
    categories = ["|".join(g for g, on in zip(_GENRES, row, strict=True) if on) for row in flags]
    items = pa.table({"item_id": raw[0], "title": raw[1], "categories": categories})
    return Source(rows, items, "unix_seconds", str(rows_file), str(items_file))


def _open_file(file: Path, config: DataConfig) -> Source:
    names = config.columns
    for key in names:
        if key not in _COLUMNS:
            raise FellrayError(
                f"data.columns.{key}: fellray knows no such column; known: {', '.join(_COLUMNS)}"
            )
    hint = "; name the right one with data.columns.{0}=<column>"
    text = [names.get(key, key) for key in ("title", "categories")]
    raw = _read_table(file, text=text)
    if config.items is None:
        rows = _pick(raw, file, ("user_id", "item_id"), ("timestamp", "rating"), names, hint)
        hint += ", or name a file of items with data.items=<file>"
        items = _pick(raw, file, ("item_id", "title"), ("categories",), names, hint)
        items = _first_titled(items)
    else:
        of_rows = {k: v for k, v in names.items() if k not in ("title", "categories")}
        rows = _pick(raw, file, ("user_id", "item_id"), ("timestamp", "rating"), of_rows, hint)
        raw = _read_table(config.items, text=text)
        of_items = {k: v for k, v in names.items() if k in ("title", "categories")}
        # The two files may call their item ids differently; then this one uses fellray's name.
        if names.get("item_id") in raw.column_names:
            of_items["item_id"] = names["item_id"]
        wanted = ("item_id", "title")
        items = _pick(raw, config.items, wanted, ("categories",), of_items, hint)
    kind: TimestampKind = "unix_seconds" if "timestamp" in rows.column_names else "order_only"
    return Source(rows, items, kind, str(file), str(config.items or file))


def _first_titled(items: pa.Table) -> pa.Table:
    """Each item's first row that has a title, or its first row where none has."""
    number = np.arange(items.num_rows)
    if pa.types.is_string(items["title"].type):
        blank = pc.equal(pc.utf8_trim_whitespace(items["title"].fill_null("")), "")
        number = number + items.num_rows * blank.to_numpy()
    numbered = items.append_column("row", pa.array(number))
    first = numbered.group_by("item_id").aggregate([("row", "min")])["row_min"].to_numpy()
    return items.take(pa.array(np.sort(first % max(1, items.num_rows))))


def _read_table(
    file: Path,
    delimiter: str | None = None,
    names: list[str] | None = None,
    encoding: str = "utf8",
    quoted: bool = True,
    text: Sequence[str] = (),
) -> pa.Table:
    """A whole Parquet or CSV file; with a delimiter given, a separated file without a header."""
    try:
        if delimiter is None and file.suffix in (".parquet", ".pq"):
            return pq.read_table(file)
        if delimiter is None and file.suffix not in (".csv", ".tsv"):
            raise FellrayError(
                f"data.source={file}: is neither 'demo', nor a folder, nor a file ending in "
                ".parquet, .pq, .csv or .tsv" + ("" if file.exists() else "; it does not exist")
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
        raise FellrayError(f"{file}: does not exist; check data.source and data.items") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise FellrayError(
            f"{file}: cannot be read ({error}); it must be whole, and Parquet or UTF-8 CSV with "
            "a header, as its name says"
        ) from None


def _pick(
    table: pa.Table,
    file: Path,
    required: Sequence[str],
    optional: Sequence[str],
    names: Mapping[str, str],
    hint: str,
) -> pa.Table:
    """The columns under fellray's names; an optional one that the config names is required."""
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
