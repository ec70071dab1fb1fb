"""Interactions: brought in from the forms people have, checked, filtered, and split.

This file must not know clients, models or the prepared folder. Item ids are the only keys of
items; titles are text and may repeat. Letters: N interactions, I items.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from fellray.platform import demo
from fellray.platform.config import DataConfig, LeaveOneOut, Temporal
from fellray.platform.errors import FellrayError

TimestampKind = Literal["unix_seconds", "order_only"]

_COLUMNS = ("user_id", "item_id", "title", "timestamp", "rating", "categories")
# The genre flags of ml-100k's u.item, in the order of its columns.
_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


@dataclass(frozen=True)
class Interactions:
    """Who met what and when; rows sorted by (user, seq).

    `items` has the columns item_id, title, categories (joined by `|`, may be empty), one row per
    item, sorted by item_id: a row's number is the item's index. `order_only` says that
    `timestamp` orders one user's rows and means nothing across users.
    """

    user_id: np.ndarray
    """int64 [N]"""
    item_id: np.ndarray
    """int64 [N]"""
    timestamp: np.ndarray
    """int64 [N]"""
    seq: np.ndarray
    """int32 [N], 0-based position in the user's history"""
    rating: np.ndarray | None
    """float32 [N], NaN where a row has none; None where the source has none"""
    items: pa.Table
    timestamp_kind: TimestampKind


@dataclass(frozen=True)
class _Source:
    """Two tables under fellray's column names, and the files to name in an error."""

    rows: pa.Table
    items: pa.Table
    kind: TimestampKind
    rows_file: str
    items_file: str


def read(config: DataConfig) -> Interactions:
    """The interactions that `config.source` names, filtered as the config says.

    Filters, in this order: `min_rating` (a row without a rating goes too), `max_users`, `k_core`.
    With a k-core above 1 the items left without interactions leave the catalogue.
    Ids given as text become their rank in sorted order. Rows of equal timestamp keep the
    order of the file; without timestamps the file's order is the order.

    Raises:
        FellrayError: a file is missing or unreadable, a column is missing or of the wrong type,
            an id, timestamp or title is missing, an item is unknown, or nothing is left.
    """
    data = _check(_open(config))
    if config.min_rating is not None:
        if data.rating is None:
            raise FellrayError(
                f"{config.source}: has no ratings, but data.min_rating is {config.min_rating}; "
                "leave data.min_rating out or name the column with data.columns.rating=<column>"
            )
        data = _keep(data, data.rating >= config.min_rating)
    if config.max_users is not None:
        users = np.unique(data.user_id)
        if config.max_users < len(users):
            rng = np.random.default_rng(config.seed)
            sample = rng.choice(users, size=config.max_users, replace=False)
            data = _keep(data, np.isin(data.user_id, sample))
    if config.k_core > 1:
        data = _keep(data, _core(data.user_id, data.item_id, config.k_core))
        met = np.isin(data.items["item_id"].to_numpy(), data.item_id)
        data = replace(data, items=data.items.filter(pa.array(met)))
    if not len(data.user_id):
        raise FellrayError(
            f"{config.source}: no interaction is left after data.min_rating={config.min_rating}, "
            f"data.max_users={config.max_users}, data.k_core={config.k_core}; lower them "
            "(data.k_core=1 keeps all)"
        )
    return data


def split(interactions: Interactions, config: LeaveOneOut | Temporal) -> np.ndarray:
    """uint8 [N]: 0 training, 1 validation, 2 test; never decreasing along a user's history.

    leave_one_out: a user with fewer than 3 interactions is all training. temporal: cut at two
    moments, quantiles of all timestamps; equal timestamps fall on the same, later side. A
    temporal split can leave a user without training rows. Their rows keep their label here; such
    a user belongs to no client, so `shards.write` drops those rows and counts them.

    Raises:
        FellrayError: nobody has 3 interactions (leave_one_out); the order is per user only, or a
            part comes out empty (temporal).
    """
    if isinstance(config, LeaveOneOut):
        _, inverse, counts = np.unique(
            interactions.user_id, return_inverse=True, return_counts=True
        )
        if counts.max(initial=0) < 3:
            raise FellrayError(
                "data.split.kind=leave_one_out needs users with at least 3 interactions (training, "
                f"validation, test); the longest of {len(counts)} histories has "
                f"{counts.max(initial=0)}: bring more interactions or lower data.min_rating"
            )
        from_end = np.cumsum(counts)[inverse] - 1 - np.arange(len(inverse))
        labels = np.where(from_end == 0, 2, np.where(from_end == 1, 1, 0))
        return np.where(counts[inverse] < 3, 0, labels).astype(np.uint8)
    if interactions.timestamp_kind == "order_only":
        raise FellrayError(
            "data.split.kind=temporal needs unix timestamps, but this source only knows the order "
            "of each user's interactions; use data.split.kind=leave_one_out"
        )
    ordered = np.sort(interactions.timestamp)
    first_valid = ordered[int((1 - config.valid - config.test) * len(ordered))]
    first_test = ordered[int((1 - config.test) * len(ordered))]
    labels = np.zeros(len(ordered), np.uint8)
    labels[interactions.timestamp >= first_valid] = 1
    labels[interactions.timestamp >= first_test] = 2
    sizes = np.bincount(labels, minlength=3)
    if not sizes.all():
        raise FellrayError(
            f"data.split.kind=temporal leaves {sizes[0]} training, {sizes[1]} validation and "
            f"{sizes[2]} test interactions, because too many share a timestamp; change "
            "data.split.valid and data.split.test, or use data.split.kind=leave_one_out"
        )
    return labels


def _open(config: DataConfig) -> _Source:
    source = Path(config.source)
    is_file = config.source != "demo" and not source.is_dir()
    if not is_file and (config.columns or config.items is not None):
        raise FellrayError(
            f"data.source={config.source}: data.columns and data.items belong to a Parquet or CSV "
            "file; leave them out, or give the file itself as data.source"
        )
    if config.source == "demo":
        rows, items = demo.make(config.seed)
        return _Source(rows, items, "unix_seconds", "demo", "demo")
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


def _open_folder(folder: Path) -> _Source:
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
        return _Source(rows, items, "unix_seconds", str(rows_file), str(items_file))
    if kind == "order_only":
        return _Source(rows, items, "order_only", str(rows_file), str(items_file))
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


def _open_movielens(folder: Path) -> _Source:
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
    return _Source(rows, items, "unix_seconds", str(rows_file), str(items_file))


def _open_file(file: Path, config: DataConfig) -> _Source:
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
        numbered = items.append_column("row", pa.array(np.arange(items.num_rows)))
        items = items.take(numbered.group_by("item_id").aggregate([("row", "min")])["row_min"])
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
    return _Source(rows, items, kind, str(file), str(config.items or file))


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
        comma = "\t" if file.suffix == ".tsv" else ","
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
                delimiter=delimiter or comma,
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
        if table.column_names.count(name) == 1:
            picked[key] = table[name]
        elif key in required or key in names:
            raise FellrayError(
                f"{file}: needs one column {name!r} ({key}); it has "
                f"{', '.join(table.column_names)}" + hint.format(key)
            )
    return pa.table(picked)


def _check(source: _Source) -> Interactions:
    rows, items = source.rows, source.items
    in_rows, in_items = source.rows_file, source.items_file
    (user_id,) = _ids("user_id", [(in_rows, rows["user_id"])])
    item_id, catalogue = _ids("item_id", [(in_rows, rows["item_id"]), (in_items, items["item_id"])])
    by_id = np.argsort(catalogue, kind="stable")
    catalogue = catalogue[by_id]
    twice = catalogue[1:][catalogue[1:] == catalogue[:-1]]
    if len(twice):
        i = by_id[np.searchsorted(catalogue, twice[0])]
        raise FellrayError(
            f"{in_items}: item_id {items['item_id'][i].as_py()!r} occurs more than once; "
            "keep one row per item"
        )
    unknown = ~np.isin(item_id, catalogue)
    if unknown.any():
        first = pc.unique(rows["item_id"].filter(pa.array(unknown))).to_pylist()
        raise FellrayError(
            f"{in_rows}: item_id {', '.join(repr(i) for i in first[:3])} ({len(first)} in all) "
            f"not in {in_items}; add them there or remove these interactions"
        )
    title = _text(in_items, "title", items["title"])
    empty = pc.equal(pc.utf8_trim_whitespace(title), "")
    if pc.any(empty).as_py():
        first = items["item_id"].filter(empty).to_pylist()
        raise FellrayError(
            f"{in_items}: no title for item_id {', '.join(repr(i) for i in first[:3])} "
            f"({len(first)} in all); the title is what the model reads, so every item needs one"
        )
    if "categories" in items.column_names:
        categories = _text(in_items, "categories", items["categories"])
    else:
        categories = pa.chunked_array([pa.array([""] * items.num_rows, pa.string())])
    columns = [pa.array(catalogue), title.take(by_id), categories.take(by_id)]

    number = np.arange(len(user_id))
    timestamp = _seconds(in_rows, rows["timestamp"]) if "timestamp" in rows.column_names else number
    if "seq" in rows.column_names:
        (order,) = _ids("seq", [(in_rows, rows["seq"])])
    else:
        order = timestamp
    by_user = np.lexsort((number, order, user_id))
    data = Interactions(
        user_id=user_id,
        item_id=item_id,
        timestamp=timestamp,
        seq=np.zeros(len(user_id), np.int32),
        rating=_ratings(in_rows, rows["rating"]) if "rating" in rows.column_names else None,
        items=pa.table(columns, names=["item_id", "title", "categories"]).combine_chunks(),
        timestamp_kind=source.kind,
    )
    data = _keep(data, by_user)
    back = (np.diff(data.timestamp) < 0) & (data.user_id[1:] == data.user_id[:-1])
    if back.any():
        raise FellrayError(
            f"{in_rows}: seq and timestamp disagree for {back.sum()} interactions, first for "
            f"user_id {data.user_id[1:][back][0]}; seq must not go back in time"
        )
    return data


def _ids(name: str, columns: list[tuple[str, pa.ChunkedArray]]) -> list[np.ndarray]:
    """int64 ids of one kind from several files; text becomes its rank over all of them."""
    plain = []
    for file, column in columns:
        values = column.cast(column.type.value_type) if _is(column, "dictionary") else column
        if values.null_count:
            raise FellrayError(
                f"{file}: {name} is null in {values.null_count} of {len(values)} rows; remove them"
            )
        if not len(values):
            raise FellrayError(f"{file}: has no rows")
        if not (_is(values, "integer") or _is(values, "string") or _is(values, "large_string")):
            raise FellrayError(
                f"{file}: {name} is of type {column.type}; ids must be whole numbers or text"
            )
        plain.append(values)
    if len({_is(values, "integer") for values in plain}) == 2:
        kinds = ", ".join(
            f"{values.type} in {file}" for (file, _), values in zip(columns, plain, strict=True)
        )
        raise FellrayError(f"{name}: is of type {kinds}; both files must have the same")
    if _is(plain[0], "integer"):
        try:
            return [values.cast(pa.int64()).to_numpy() for values in plain]
        except pa.ArrowInvalid as error:
            raise FellrayError(f"{columns[0][0]}: {name} does not fit int64 ({error})") from None
    plain = [values.cast(pa.large_string()) for values in plain]
    known = pc.unique(pa.chunked_array([c for values in plain for c in values.chunks]))
    known = known.take(pc.sort_indices(known))
    return [pc.index_in(values, value_set=known).to_numpy().astype(np.int64) for values in plain]


def _seconds(file: str, column: pa.ChunkedArray) -> np.ndarray:
    """int64 unix seconds from whole numbers, fractions or dates."""
    if column.null_count:
        raise FellrayError(
            f"{file}: timestamp is null in {column.null_count} of {len(column)} rows; remove them"
        )
    if _is(column, "timestamp") or _is(column, "date"):
        column = column.cast(pa.timestamp("s"), safe=False)
    elif _is(column, "floating") and pc.all(pc.is_finite(column)).as_py():
        column = pc.floor(column)
    elif not _is(column, "integer"):
        raise FellrayError(
            f"{file}: timestamp is of type {column.type}; it must hold unix seconds or dates. "
            "Convert it, or remove the column, and the order of the rows counts"
        )
    return _numpy(column, np.int64)


def _ratings(file: str, column: pa.ChunkedArray) -> np.ndarray | None:
    if column.null_count == len(column):
        return None
    if not (_is(column, "integer") or _is(column, "floating")):
        raise FellrayError(
            f"{file}: rating is of type {column.type}; it must be a number, or leave the column out"
        )
    return _numpy(column, np.float32)


def _text(file: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text without nulls; a list of texts is joined by `|`."""
    if _is(column, "dictionary"):
        column = column.cast(column.type.value_type)
    if _is(column, "list") or _is(column, "large_list"):
        column = pc.binary_join(column.cast(pa.list_(pa.string())), "|")
    if not (_is(column, "string") or _is(column, "large_string") or _is(column, "null")):
        raise FellrayError(f"{file}: {name} is of type {column.type}; it must be text")
    return column.cast(pa.string()).fill_null("")


def _numpy(column: pa.ChunkedArray, dtype: type[np.generic]) -> np.ndarray:
    values: np.ndarray = column.cast(pa.from_numpy_dtype(dtype), safe=False).to_numpy()
    return values


def _is(column: pa.ChunkedArray, kind: str) -> bool:
    return bool(getattr(pa.types, f"is_{kind}")(column.type))


def _keep(data: Interactions, rows: np.ndarray) -> Interactions:
    """Some rows (a mask), or all in another order (indices), with `seq` counted anew."""
    user_id = data.user_id[rows]
    new = np.r_[True, user_id[1:] != user_id[:-1]][: len(user_id)]
    starts = np.flatnonzero(new)
    seq = np.arange(len(user_id)) - np.repeat(starts, np.diff(np.r_[starts, len(user_id)]))
    return replace(
        data,
        user_id=user_id,
        item_id=data.item_id[rows],
        timestamp=data.timestamp[rows],
        seq=seq.astype(np.int32),
        rating=None if data.rating is None else data.rating[rows],
    )


def _core(user_id: np.ndarray, item_id: np.ndarray, k: int) -> np.ndarray:
    """Row numbers of the k-core: every user and item left has at least k of the rows left."""
    user = np.unique(user_id, return_inverse=True)[1]
    item = np.unique(item_id, return_inverse=True)[1]
    rows = np.arange(len(user))
    while len(rows):
        of_user, of_item = np.bincount(user[rows]), np.bincount(item[rows])
        enough = (of_user[user[rows]] >= k) & (of_item[item[rows]] >= k)
        if enough.all():
            break
        rows = rows[enough]
    return rows
