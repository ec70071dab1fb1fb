"""Prepared data extended by events: every client's interactions, and after them what came since.

What is held out stays what it was, with the same histories before it; events are trained on and
counted. An item that came after the first training is among the items once somebody has met it. It
must not know how events are stored, models or rounds.

Letters: N interactions, I items, D width of a vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fellray.platform.additions import Batch
from fellray.platform.data_config import DataConfig
from fellray.platform.errors import FellrayError
from fellray.platform.events import Event
from fellray.platform.intake import Taken
from fellray.platform.interactions import Interactions
from fellray.platform.shard import LATER
from fellray.platform.shard_writing import write_shards
from fellray.platform.shards import Dataset


@dataclass(frozen=True)
class Added:
    """What became of a client's new events."""

    taken: Taken
    """From the beginning, those of earlier times too."""
    events: Sequence[Event]
    """The new ones, as they came."""


def taken_of(data: Dataset) -> dict[str, Taken]:
    """Client -> which of its events are part of prepared data; only those with any."""
    return {c: Taken(**entry) for c, entry in data.manifest.get("events", {}).items()}


def extend(
    data: Dataset,
    config: DataConfig,
    added: Mapping[str, Added],
    path: Path,
    later: Batch | None = None,
) -> dict[str, int]:
    """Write a prepared folder at `path` with the events of each client at its users' ends.

    A user's events are in the order of their time, those of one moment in that of their arrival.

    Args:
        config: of `data`.
        added: of the clients that have new events.
        later: items that join those of `data`, each once and none of them there.

    Returns:
        `events` and `clients` that have any, and `repeats`: events in which a user meets the very
        item that is held out of the same user's history, so that its test is no longer blind.

    Raises:
        FellrayError: an event names what the data do not have, or `path` is something else.
    """
    items, vectors_ID = _join_items(data, later)
    item_ids = items["item_id"].to_numpy()
    now_I = np.searchsorted(item_ids, data.item_ids).astype(np.int32)
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("user_id", "item", "timestamp", "split")
    }
    users: dict[str, np.ndarray] = {}
    repeats = 0
    for client in data.clients:
        table = data.rows(client)
        held = {name: table[name].to_numpy() for name in columns}
        held["item"] = now_I[held["item"]]
        users[client] = np.unique(held["user_id"])
        parts = [held]
        if client in added:
            fresh = _columns(client, added[client].events, item_ids, users[client])
            parts.append(fresh)
            repeats += _count_repeats(held, fresh)
        for name, of_all in columns.items():
            of_all += [part[name] for part in parts]
    joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    # stable: a user's rows are in one client, in order, and the new ones follow
    by_user = np.argsort(joined["user_id"], kind="stable")
    user_id, item, timestamp, splits = (joined[name][by_user] for name in columns)
    new = np.r_[True, user_id[1:] != user_id[:-1]]
    starts = np.flatnonzero(new)
    seq = np.arange(len(user_id)) - np.repeat(starts, np.diff(np.r_[starts, len(user_id)]))
    interactions = Interactions(
        user_id=user_id,
        item_id=item_ids[item],
        timestamp=timestamp,
        seq=seq.astype(np.int32),
        rating=None,
        items=items,
        timestamp_kind="order_only",
        users=data.users,
        left_out=data.manifest.get("left_out", {}),
    )
    encoder = data.manifest["encoder"]
    write_shards(
        config.model_copy(update={"path": path}),
        interactions,
        splits,
        users,
        encoder["name"],
        encoder["sha256"],
        vectors_ID,
        {
            client: asdict(taken)
            for client, taken in sorted(
                (taken_of(data) | {c: one.taken for c, one in added.items()}).items()
            )
        },
    )
    count = sum(len(one.events) for one in added.values())
    return {"events": count, "clients": len(added), "repeats": repeats}


def _join_items(data: Dataset, later: Batch | None) -> tuple[pa.Table, np.ndarray]:
    """All items by their ids, and their vectors; a later one has no name in the source."""
    columns = {"item_id": data.item_ids, "title": data.titles, "categories": data.categories}
    table = pa.table(columns)
    if data.source_ids is not None:
        table = table.append_column("source_id", pa.array(data.source_ids, pa.string()))
    if later is None:
        return table, data.vectors.numpy()
    categories = ["|".join(own) for own in later.categories]
    more = pa.table({"item_id": later.ids, "title": later.titles, "categories": categories})
    joined = pa.concat_tables([table, more], promote_options="default")
    vectors_ID = np.concatenate([data.vectors.numpy(), later.vectors.numpy()])
    by_id = np.argsort(joined["item_id"].to_numpy())
    return joined.take(by_id), vectors_ID[by_id]


def _columns(
    client: str, events: Sequence[Event], item_ids: np.ndarray, users: np.ndarray
) -> dict[str, np.ndarray]:
    user_id = np.array([event.user_id for event in events], np.int64)
    item_id = np.array([event.item_id for event in events], np.int64)
    timestamp = np.array([event.timestamp for event in events], np.int64)
    item = np.searchsorted(item_ids, item_id).clip(max=len(item_ids) - 1)
    strange = (item_ids[item] != item_id) | ~np.isin(user_id, users)
    if strange.any():
        one = events[int(strange.argmax())]
        raise FellrayError(
            f"event {one.event_id!r} of client {client}: user {one.user_id} or item {one.item_id} "
            "is not in the prepared data, nor is the item in items/ of the run that began the "
            "line: restore that folder, or were these events stored for another run?"
        )
    by_time = np.argsort(timestamp, kind="stable")
    return {
        "user_id": user_id[by_time],
        "item": item[by_time].astype(np.int32),
        "timestamp": timestamp[by_time],
        "split": np.full(len(events), LATER, np.uint8),
    }


def _count_repeats(held: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray]) -> int:
    out = (held["split"] == 1) | (held["split"] == 2)
    truth = set(zip(held["user_id"][out].tolist(), held["item"][out].tolist(), strict=True))
    met = zip(fresh["user_id"].tolist(), fresh["item"].tolist(), strict=True)
    return sum(pair in truth for pair in met)
