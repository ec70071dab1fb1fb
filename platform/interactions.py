"""Interactions: checked, filtered and split.

This file must not know clients, models or the prepared folder, nor how a source is opened. Item ids
are the only keys of items; titles are text and may repeat. Letters: N interactions, I items.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fellray.platform.columns import order_once, to_ids, to_ratings, to_seconds, to_text
from fellray.platform.data_config import DataConfig, LeaveOneOut, Temporal
from fellray.platform.errors import FellrayError
from fellray.platform.sources import open_source
from fellray.platform.tables import Source, TimestampKind
from fellray.platform.user_attributes import check_users


@dataclass(frozen=True)
class Interactions:
    """Who met what and when; rows sorted by (user, seq).

    `items` has the columns item_id, title, categories (joined by `|`, may be empty), one row per
    item, sorted by item_id: a row's number is the item's index. Where the source's ids are text,
    they are its column source_id. `order_only` says that
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
    users: pa.Table | None = None
    """`user_id` and their attributes, sorted by user_id; None where the source says nothing of its
    users"""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many of what the source's reader did not take"""


def read(config: DataConfig) -> Interactions:
    """The interactions that `config.source` names, filtered as the config says.

    Filters, in this order: `min_rating` (a row without a rating goes too), `max_users`, `k_core`.
    With a k-core above 1 the items left without interactions leave the catalogue.
    Ids given as text become their rank in sorted order, over all files that name them. Rows of
    equal timestamp keep the order of the file; without timestamps the file's order is the order.

    Raises:
        FellrayError: a file is missing or unreadable, a column is missing or of the wrong type,
            an id, timestamp or title is missing, an item is unknown, or nothing is left.
    """
    data = _check(open_source(config))
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
        filters = {name: getattr(config, name) for name in ("min_rating", "max_users", "k_core")}
        told = [f"data.{name}={value}" for name, value in filters.items() if value is not None]
        raise FellrayError(
            f"{config.source}: no interaction is left after {', '.join(told)}; lower them: "
            "data.k_core drops users and items with fewer interactions (1 keeps all)"
        )
    return data


def split(interactions: Interactions, config: LeaveOneOut | Temporal) -> np.ndarray:
    """uint8 [N]: 0 training, 1 validation, 2 test; never decreasing along a user's history.

    leave_one_out: a user with fewer than 3 interactions is all training. temporal: cut at two
    moments, quantiles of all timestamps; equal timestamps fall on the same, later side. A
    temporal split can leave a user without training rows. Their rows keep their label here; such
    a user belongs to no client, so `write_shards` drops those rows and counts them.

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


def _check(source: Source) -> Interactions:
    """All rows of a source, every value checked, in order."""
    rows, items = source.rows, source.items
    in_rows, in_items = source.rows_file, source.items_file
    if source.users is None:
        (user_id,) = to_ids("user_id", [(in_rows, rows["user_id"])])
        users = None
    else:
        columns = [(in_rows, rows["user_id"]), (source.users_file, source.users["user_id"])]
        user_id, known = to_ids("user_id", columns)
        users = check_users(source.users_file, source.users, known)
    item_id, catalogue = to_ids(
        "item_id", [(in_rows, rows["item_id"]), (in_items, items["item_id"])]
    )
    by_id = order_once(in_items, "item", items["item_id"], catalogue)
    catalogue = catalogue[by_id]
    unknown = ~np.isin(item_id, catalogue)
    if unknown.any():
        strangers = pc.unique(rows["item_id"].filter(pa.array(unknown)))
        raise FellrayError(
            f"{in_rows}: item_id {_name_some(strangers)} not in {in_items}; "
            "add them there or remove these interactions"
        )
    title = to_text(in_items, "title", items["title"])
    empty = pc.equal(pc.utf8_trim_whitespace(title), "")
    if pc.any(empty).as_py():
        raise FellrayError(
            f"{in_items}: no title for item_id {_name_some(items['item_id'].filter(empty))}; the "
            "title is what the model reads, so every item needs one"
        )
    if "categories" in items.column_names:
        categories = to_text(in_items, "categories", items["categories"])
    else:
        categories = pa.chunked_array([pa.array([""] * items.num_rows, pa.string())])
    described = {"item_id": catalogue, "title": title.take(by_id)}
    described["categories"] = categories.take(by_id)
    if not pa.types.is_integer(items["item_id"].type):
        described["source_id"] = to_text(in_items, "item_id", items["item_id"]).take(by_id)

    if "timestamp" in rows.column_names:
        timestamp = to_seconds(in_rows, rows["timestamp"])
    else:
        timestamp = np.arange(len(user_id))
    if "seq" in rows.column_names:
        (order,) = to_ids("seq", [(in_rows, rows["seq"])])
    else:
        order = timestamp
    by_user = np.lexsort((order, user_id))  # stable: what ties keeps the order of the file
    data = Interactions(
        user_id=user_id,
        item_id=item_id,
        timestamp=timestamp,
        seq=np.zeros(len(user_id), np.int32),
        rating=to_ratings(in_rows, rows["rating"]) if "rating" in rows.column_names else None,
        items=pa.table(described).combine_chunks(),
        timestamp_kind=source.kind,
        users=users,
        left_out=source.left_out,
    )
    data = _keep(data, by_user)
    back = (np.diff(data.timestamp) < 0) & (data.user_id[1:] == data.user_id[:-1])
    if back.any():
        raise FellrayError(
            f"{in_rows}: seq and timestamp disagree for {back.sum()} interactions, first for "
            f"user_id {data.user_id[1:][back][0]}; seq must not go back in time"
        )
    return data


def _name_some(ids: pa.Array | pa.ChunkedArray) -> str:
    """The first three, and how many there are."""
    return f"{', '.join(map(repr, ids[:3].to_pylist()))} ({len(ids)} in all)"


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
