"""Columns of a source, checked and made into arrays: ids, moments, ratings, text.

It must not know how a file is opened, nor how columns belong together. Every error names the file
and the column.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fellray.platform.errors import FellrayError


def to_ids(name: str, columns: list[tuple[str, pa.ChunkedArray]]) -> list[np.ndarray]:
    """int64 ids of one kind from several files; text becomes its rank over all of them.

    Args:
        name: what the ids are called in an error.
        columns: (file, column) pairs.

    Raises:
        FellrayError: ids are missing, neither whole numbers nor text, or not of one type.
    """
    plain = []
    for file, column in columns:
        values = _decode(column)
        if _is(values, "string") or _is(values, "large_string"):
            # an empty cell of a CSV file is an empty text
            blank = pc.equal(pc.utf8_trim_whitespace(values), "")
            values = pc.if_else(blank, pa.scalar(None, values.type), values)
        _refuse_nulls(file, name, values)
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


def order_once(file: str, kind: str, column: pa.ChunkedArray, ids: np.ndarray) -> np.ndarray:
    """The rows in order of their ids, of which none occurs twice.

    Args:
        kind: whose ids they are, `user` or `item`.
        column: the ids as the file has them.
        ids: the same, as `to_ids` returns them.

    Raises:
        FellrayError: an id occurs twice.
    """
    by_id = np.argsort(ids, kind="stable")
    in_order = ids[by_id]
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    if len(twice):
        value = column[by_id[np.searchsorted(in_order, twice[0])]].as_py()
        raise FellrayError(
            f"{file}: {kind}_id {value!r} occurs more than once; keep one row per {kind}"
        )
    return by_id


def to_seconds(file: str, column: pa.ChunkedArray) -> np.ndarray:
    """int64 unix seconds from whole numbers, fractions or dates.

    Raises:
        FellrayError: one is missing, or they are of another type.
    """
    _refuse_nulls(file, "timestamp", column)
    if _is(column, "timestamp") or _is(column, "date"):
        column = column.cast(pa.timestamp("s"), safe=False)
    elif _is(column, "floating") and pc.all(pc.is_finite(column)).as_py():
        column = pc.floor(column)
    elif not _is(column, "integer"):
        raise FellrayError(
            f"{file}: timestamp is of type {column.type}; it must hold unix seconds or dates. "
            "Convert it, or remove the column, and the order of the rows counts"
        )
    return _to_numpy(column, np.int64)


def to_ratings(file: str, column: pa.ChunkedArray) -> np.ndarray | None:
    """float32, NaN where a row has none; None where no row has one.

    Raises:
        FellrayError: they are no numbers.
    """
    if column.null_count == len(column):
        return None
    if not (_is(column, "integer") or _is(column, "floating")):
        raise FellrayError(
            f"{file}: rating is of type {column.type}; it must be a number, or leave the column out"
        )
    return _to_numpy(column, np.float32)


def to_text(file: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text without nulls; a list of texts is joined by `|`.

    Raises:
        FellrayError: it is no text.
    """
    column = _decode(column)
    if _is(column, "list") or _is(column, "large_list"):
        column = pc.binary_join(column.cast(pa.list_(pa.string())), "|")
    if not (_is(column, "string") or _is(column, "large_string") or _is(column, "null")):
        raise FellrayError(f"{file}: {name} is of type {column.type}; it must be text")
    return column.cast(pa.string()).fill_null("")


def _refuse_nulls(file: str, name: str, column: pa.ChunkedArray) -> None:
    if column.null_count:
        places = np.flatnonzero(column.is_null().to_numpy()) + 1
        first = ", ".join(map(str, places[:3]))
        raise FellrayError(
            f"{file}: {name} is null or empty in {len(places):,} of {len(column):,} rows, in row "
            f"{first}{' ...' if len(places) > 3 else ''} after the header; remove or fill them"
        )


def _decode(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of a dictionary-encoded column."""
    return column.cast(column.type.value_type) if _is(column, "dictionary") else column


def _to_numpy(column: pa.ChunkedArray, dtype: type[np.generic]) -> np.ndarray:
    values: np.ndarray = column.cast(pa.from_numpy_dtype(dtype), safe=False).to_numpy()
    return values


def _is(column: pa.ChunkedArray, kind: str) -> bool:
    return bool(getattr(pa.types, f"is_{kind}")(column.type))
