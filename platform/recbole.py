"""RecBole's atomic files: `NAME.inter`, `NAME.item` and, where there is one, `NAME.user`.

Tab-separated text whose header gives each column's type (`user_id:token`). Facts of the format:
https://recbole.io/docs/user_guide/data/atomic_files.html. It must not know what the values are
worth.

A token is text in RecBole; ids that are all written as plain whole numbers (no leading zero) are
numbers here, so that they stay what they were.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from fellray.platform.errors import FellrayError
from fellray.platform.tables import Source, drop_untitled, missing, pick, pick_users, read_typed

_TYPES = {
    "token": pa.string(),
    "token_seq": pa.string(),
    "float": pa.float64(),
    "float_seq": pa.string(),
}
_TITLES = ("title", "movie_title", "name", "item_name", "product_title", "book_title")
_CATEGORIES = ("categories", "category", "genres", "genre", "class")
_ENDINGS = (".inter", ".item", ".user")
_PLAIN = "^(0|[1-9][0-9]{0,17})$"


def find_interactions(source: Path) -> Path | None:
    """The `.inter` file that a path is or holds; None where there is none.

    Raises:
        FellrayError: the folder holds several.
    """
    if source.suffix == ".inter":
        return source
    found = sorted(source.glob("*.inter")) if source.is_dir() else []
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise FellrayError(
            f"{source}: holds several .inter files ({names}); give the one to read as data.source "
            "(files split into parts belong into one: fellray splits by itself)"
        )
    return found[0] if found else None


def open_atomic(file: Path, names: Mapping[str, str]) -> Source:
    """The three tables beside an `.inter` file. Items without a title are left out and counted.

    Args:
        names: fellray's names -> the files' own, without their types, where they are not
            RecBole's usual ones.

    Raises:
        FellrayError: a file or a column is missing, a header gives no type, or a row does not fit.
    """
    rows_file, items_file, users_file = (file.with_suffix(end) for end in _ENDINGS)
    raw = _read_atomic(rows_file)
    if listed := [name for name in raw.column_names if name.endswith("_list")]:
        raise FellrayError(
            f"{rows_file}: has {listed[0]!r}, so a row is a whole sequence; fellray reads a row "
            "per interaction (RecBole's plain .inter file) and makes the sequences itself"
        )
    hint = "; name the right one with data.columns.{0}=<name without its type>"
    of_rows = {k: v for k, v in names.items() if k not in ("title", "categories")}
    rows = pick(raw, rows_file, ("user_id", "item_id"), ("timestamp", "rating"), of_rows, hint)
    if not items_file.is_file():
        raise FellrayError(
            f"{items_file}: does not exist; fellray's model reads titles, which RecBole keeps there"
        )
    raw = _read_atomic(items_file)
    of_items = {k: v for k, v in names.items() if k in ("item_id", "title", "categories")}
    for ours, usual in (("title", _TITLES), ("categories", _CATEGORIES)):
        known = [name for name in usual if name in raw.column_names]
        if known:
            of_items.setdefault(ours, known[0])
    items = pick(raw, items_file, ("item_id", "title"), ("categories",), of_items, hint)
    if "categories" in items.column_names:
        split = _split_tokens(items["categories"])
        items = items.set_column(items.column_names.index("categories"), "categories", split)
    users = None
    if users_file.is_file():
        users = pick_users(_read_atomic(users_file), users_file, of_rows)
        rows, users = _with_plain_ids("user_id", rows, users)
    else:
        (rows,) = _with_plain_ids("user_id", rows)
    rows, items = _with_plain_ids("item_id", rows, items)
    rows, items, left_out = drop_untitled(rows, rows_file, items, items_file)
    return Source(
        rows=rows,
        items=items,
        kind="unix_seconds" if "timestamp" in rows.column_names else "order_only",
        rows_file=str(rows_file),
        items_file=str(items_file),
        users=users,
        users_file=str(users_file),
        left_out=left_out,
    )


def _read_atomic(file: Path) -> pa.Table:
    types = _read_header(file)
    table = read_typed(file, types, "\t", "a RecBole atomic file")
    if not table.num_rows:
        raise FellrayError(f"{file}: has a header and no rows; take the original file")
    return table.rename_columns([name.rpartition(":")[0] for name in types])


def _read_header(file: Path) -> dict[str, pa.DataType]:
    try:
        with file.open(encoding="utf-8") as opened:
            line = opened.readline().rstrip("\r\n")
    except FileNotFoundError:
        raise missing(file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FellrayError(f"{file}: cannot be read ({error})") from None
    if not line:
        raise FellrayError(f"{file}: is empty; its first line must name the columns")
    types = {}
    for entry in line.split("\t"):
        name, _, kind = entry.rpartition(":")
        if not name or ":" in name or kind not in _TYPES:
            raise FellrayError(
                f"{file}: line 1: column {entry!r} has no type; RecBole writes name:type, "
                f"separated by tabs, with a type of {', '.join(_TYPES)}"
            )
        if entry in types:
            raise FellrayError(f"{file}: line 1: column {entry!r} is there twice")
        types[entry] = _TYPES[kind]
    return types


def _split_tokens(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Tokens joined by `|`: split at commas where the column has a comma and a space, else at
    spaces (RecBole's own separator, which its conversions of Amazon and anime sets do not keep).
    """
    column = column.fill_null("")
    if not pc.any(pc.match_substring(column, ", ")).as_py():
        return pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"\s+", "|")
    column = pc.replace_substring_regex(column, r",\s+", "|")
    column = pc.replace_substring_regex(column, r"""(^|\|)['"\[\s]+""", r"\1")
    return pc.replace_substring_regex(column, r"""['"\]\s]+(\||$)""", r"\1")


def _with_plain_ids(name: str, *tables: pa.Table) -> Sequence[pa.Table]:
    """The tables, with ids as numbers where all tables write them as plain whole numbers."""
    columns = [table[name] for table in tables]
    if not all(pc.all(pc.match_substring_regex(column, _PLAIN)).as_py() for column in columns):
        return tables
    return [
        table.set_column(table.column_names.index(name), name, column.cast(pa.int64()))
        for table, column in zip(tables, columns, strict=True)
    ]
