"""User attributes: what a source says of its users beside what they met, one row per user.

They belong to the users, as histories do. It must not know how a file is opened, nor what anybody
makes of an attribute. Letters: U users.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fellray.platform.columns import order_once, to_text
from fellray.platform.errors import FellrayError


def check_users(file: str, users: pa.Table, ids: np.ndarray) -> pa.Table:
    """Users sorted by `user_id` (int64, each once) with their attributes: numbers, flags or text.

    A list of texts is joined by `|`. A value may be missing.

    Args:
        users: `user_id` and the attributes, as a file has them.
        ids: int64 [U], the ids of its rows.

    Raises:
        FellrayError: a user is there twice, there is no attribute, or one is of another type.
    """
    by_id = order_once(file, "user", users["user_id"], ids)
    names = [name for name in users.column_names if name != "user_id"]
    if not names:
        raise FellrayError(f"{file}: has no column besides user_id; an attribute is a column")
    columns = {"user_id": pa.array(ids[by_id])}
    order = pa.array(by_id)
    for name in names:
        column = users[name]
        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or _is_flag(kind)):
            absent = column.is_null()
            column = pc.if_else(absent, None, to_text(file, name, column))
        columns[name] = column.take(order)
    return pa.table(columns).combine_chunks()


def of_users(users: pa.Table, ids: np.ndarray) -> pa.Table:
    """A row for each id, in order; missing values where the table does not know the user.

    Args:
        users: as `check_users` returns it.
        ids: int64 [U].
    """
    known = users["user_id"].to_numpy()
    place = np.searchsorted(known, ids).clip(max=max(0, len(known) - 1))
    strange = known[place] != ids
    rows = users.drop_columns(["user_id"]).take(pa.array(place, mask=strange))
    return rows.add_column(0, "user_id", pa.array(ids))


def _is_flag(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind))
