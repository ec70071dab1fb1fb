"""MovieLens: the files of GroupLens' rating sets, as they come.

ml-100k (`u.data`, `u.item`, `u.user`), ml-1m and ml-10m (`.dat` files, separated by `::`), ml-32m
and the others of its form (ml-20m, ml-25m, ml-latest: `ratings.csv`, `movies.csv`). It must not
know what the values are worth. Facts of the formats: the README files that GroupLens puts beside
them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fellray.platform.errors import FellrayError
from fellray.platform.tables import Source, missing, read_table, read_typed

# The genre flags of ml-100k's u.item, in the order of its columns.
_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_NO_GENRE = "(no genres listed)"
_ID, _TEXT = pa.int64(), pa.string()
_RATINGS = {"user_id": _ID, "item_id": _ID, "rating": pa.float32(), "timestamp": pa.int64()}
_ITEMS = {"item_id": _ID, "title": _TEXT, "categories": _TEXT}
# Age and occupation are codes in ml-1m: its README says what they stand for.
_USERS_1M = {"user_id": _ID, "gender": _TEXT, "age": _ID, "occupation": _ID, "zip_code": _TEXT}
_USERS_100K = {"user_id": _ID, "age": _ID, "gender": _TEXT, "occupation": _TEXT, "zip_code": _TEXT}


def open_movielens(folder: Path) -> Source | None:
    """A folder of one of the MovieLens sets; None where it is something else.

    Raises:
        FellrayError: a file is missing, or is not what the set has under that name.
    """
    if (folder / "u.data").is_file():
        return _open_100k(folder)
    if (folder / "ratings.dat").is_file():
        return _open_dat(folder)
    if (folder / "ratings.csv").is_file() and (folder / "movies.csv").is_file():
        return _open_csv(folder)
    return None


def _open_100k(folder: Path) -> Source:
    rows_file, items_file, users_file = folder / "u.data", folder / "u.item", folder / "u.user"
    rows = read_table(rows_file, delimiter="\t", names=list(_RATINGS))
    raw = read_table(items_file, delimiter="|", encoding="latin-1", quoted=False)
    if raw.num_columns != 5 + len(_GENRES):
        raise FellrayError(
            f"{items_file}: has {raw.num_columns} columns separated by '|', ml-100k's has "
            f"{5 + len(_GENRES)}; take the original file"
        )
    flags = np.stack([raw[5 + g].to_numpy() for g in range(len(_GENRES))], axis=1)
    categories = ["|".join(g for g, on in zip(_GENRES, row, strict=True) if on) for row in flags]
    items = pa.table({"item_id": raw[0], "title": raw[1], "categories": categories})
    users = None
    if users_file.is_file():
        users = _read_bare(users_file, _USERS_100K, b"|", "ml-100k's u.user")
    files = (str(rows_file), str(items_file))
    return Source(rows, items, "unix_seconds", *files, users, str(users_file))


def _open_dat(folder: Path) -> Source:
    rows_file, items_file = folder / "ratings.dat", folder / "movies.dat"
    users_file = folder / "users.dat"
    rows = _read_bare(rows_file, _RATINGS, b"::", "UserID::MovieID::Rating::Timestamp")
    items = _read_bare(items_file, _ITEMS, b"::", "MovieID::Title::Genres")
    users = None
    if users_file.is_file():  # ml-10m has none
        form = "UserID::Gender::Age::Occupation::Zip-code"
        users = _read_bare(users_file, _USERS_1M, b"::", form)
    items = _without_placeholder(items)
    files = (str(rows_file), str(items_file))
    return Source(rows, items, "unix_seconds", *files, users, str(users_file))


def _open_csv(folder: Path) -> Source:
    rows_file, items_file = folder / "ratings.csv", folder / "movies.csv"
    rows = _read_named(rows_file, ("userId", "movieId", "rating", "timestamp"), _RATINGS)
    items = _read_named(items_file, ("movieId", "title", "genres"), _ITEMS)
    items = _without_placeholder(items)
    return Source(rows, items, "unix_seconds", str(rows_file), str(items_file))


def _read_named(file: Path, names: Sequence[str], ours: Mapping[str, pa.DataType]) -> pa.Table:
    types = dict(zip(names, ours.values(), strict=True))
    form = f"ml-32m's {file.name}, {','.join(names)}"
    return read_typed(file, types, ",", form, quoted=True).rename_columns(list(ours))


def _read_bare(file: Path, types: Mapping[str, pa.DataType], mark: bytes, form: str) -> pa.Table:
    """A file without a header; Arrow's separators are one byte, so a longer one is replaced."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise missing(file) from None
    except OSError as error:
        raise FellrayError(f"{file}: cannot be read ({error.strerror})") from None
    if not raw.strip():
        raise FellrayError(f"{file}: is empty; take the original file")
    delimiter = mark.decode() if len(mark) == 1 else "\x1f"
    raw = raw if len(mark) == 1 else raw.replace(mark, b"\x1f")
    try:
        raw.decode()
    except UnicodeDecodeError:  # ml-100k and ml-1m are Latin-1, ml-10m is UTF-8
        raw = raw.decode("latin-1").encode()
    return read_typed(file, types, delimiter, form, raw=raw)


def _without_placeholder(items: pa.Table) -> pa.Table:
    genres = items["categories"].fill_null("")
    genres = pc.if_else(pc.equal(genres, _NO_GENRE), "", genres)
    return items.set_column(items.column_names.index("categories"), "categories", genres)
