"""The prepared folder, written: whole, or not at all.

It must not know models, methods or rounds. Letters: N interactions, I items, D width of a vector.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from fellray.platform.data_config import DataConfig
from fellray.platform.errors import FellrayError
from fellray.platform.interactions import Interactions
from fellray.platform.shard import LATER, is_training
from fellray.platform.shards import MANIFEST, VERSION
from fellray.platform.user_attributes import of_users

_SPLITS = ("train", "valid", "test")


def write_shards(
    config: DataConfig,
    interactions: Interactions,
    splits: np.ndarray,
    clients: Mapping[str, np.ndarray],
    encoder_name: str,
    encoder_sha256: str,
    vectors_ID: np.ndarray,
    events: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the prepared folder `config.path` and returns its manifest.

    The folder appears whole, by a rename; one that is there is replaced only then. The same
    input gives the same bytes, wherever the folder lies: the manifest leaves `path` out.
    Interactions of users who belong to no client are dropped and counted.

    Args:
        splits: uint8 [N], as `interactions.split` gives them.
        clients: client id -> its users' ids, as `partition.partition` gives them.
        vectors_ID: float32 [I, D], one per row of `interactions.items`.
        events: plain JSON data, which of the clients' events are among the interactions.

    Raises:
        FellrayError: a client has nothing to train on, or `config.path` is something else than a
            prepared folder.
    """
    num_items = interactions.items.num_rows
    assert vectors_ID.dtype == np.float32, vectors_ID.dtype
    assert len(vectors_ID) == num_items, vectors_ID.shape
    assert np.isfinite(vectors_ID).all(), "an item's vector is a NaN or an infinity"
    path = config.path
    if path.exists() and not (path.is_dir() and _may_replace(path)):
        raise FellrayError(
            f"{path}: exists and is no prepared folder, so it is left alone; remove it or choose "
            "another data.path"
        )
    names = sorted(clients)
    users = np.concatenate([clients[name] for name in names])
    owner = np.repeat(np.arange(len(names)), [len(clients[name]) for name in names])
    by_user = np.argsort(users, kind="stable")
    users, owner = users[by_user], owner[by_user]
    assert (np.diff(users) > 0).all(), "a user belongs to one client"
    place = np.searchsorted(users, interactions.user_id).clip(max=len(users) - 1)
    kept = users[place] == interactions.user_id
    item = np.searchsorted(interactions.items["item_id"].to_numpy(), interactions.item_id)
    popularity = np.bincount(item[kept & is_training(splits)], minlength=num_items)
    # A stable sort: within a client the rows stay sorted by (user, seq).
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(owner[place[rows]], kind="stable")]
    bounds = np.searchsorted(owner[place[rows]], np.arange(len(names) + 1))
    columns = {
        "user_id": interactions.user_id[rows],
        "item": item[rows].astype(np.int32),
        "timestamp": interactions.timestamp[rows],
        "split": splits[rows],
    }
    _refuse_idle_clients(names, bounds, columns["user_id"], columns["split"])

    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        (fresh / "clients").mkdir(parents=True)
        table = interactions.items.append_column("popularity", pa.array(popularity))
        items_sha256 = _write_table(fresh / "items.parquet", table)
        vectors = safetensors.numpy.save({"items": np.ascontiguousarray(vectors_ID)})
        vectors_sha256 = _write(fresh / "vectors.safetensors", vectors)
        table = pa.table(columns)
        entries = {}
        for name, start, stop in zip(names, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            file = f"clients/{name}.parquet"
            entries[name] = {
                "file": file,
                "sha256": _write_table(fresh / file, table.slice(start, stop - start)),
                "users": len(clients[name]),
                **_count_splits(columns["split"][start:stop]),
            }
        known = {}
        if interactions.users is not None:
            table = of_users(interactions.users, users)
            sha256 = _write_table(fresh / "users.parquet", table)
            known = {"file": "users.parquet", "sha256": sha256, "count": len(users)}
        unset = {"users"} if config.users is None else set()
        manifest = {
            "version": VERSION,
            "data": config.model_dump(mode="json", exclude={"path"} | unset),
            "encoder": {"name": encoder_name, "sha256": encoder_sha256},
            "counts": {
                "users": len(users),
                "items": num_items,
                "interactions": len(rows),
                **_count_splits(columns["split"]),
                "dropped": int((~kept).sum()),
            },
            "items": {"file": "items.parquet", "sha256": items_sha256, "count": num_items},
            "vectors": {
                "file": "vectors.safetensors",
                "sha256": vectors_sha256,
                "dim": vectors_ID.shape[1],
            },
            "clients": entries,
            **({"users": known} if known else {}),
            **({"left_out": dict(interactions.left_out)} if interactions.left_out else {}),
            **({"events": dict(events)} if events else {}),
        }
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (fresh / MANIFEST).write_text(text, encoding="utf-8")
        _install(fresh, path)
    except OSError as error:
        raise FellrayError(
            f"{path}: cannot be written ({error.strerror}); mend that or choose another data.path"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return manifest


def _refuse_idle_clients(
    names: list[str], bounds: np.ndarray, user_id: np.ndarray, split: np.ndarray
) -> None:
    """A training example needs two training rows of one user: a history and what came next."""
    usable = (split == 0) & np.r_[False, user_id[1:] == user_id[:-1]][: len(split)]
    examples = np.diff(np.r_[0, np.cumsum(usable)][bounds])
    idle = [name for name, count in zip(names, examples, strict=True) if not count]
    if idle:
        raise FellrayError(
            f"client {', '.join(idle[:3])} ({len(idle)} of {len(names)} clients): no user has 2 "
            "training interactions, so there is nothing to train on; raise data.k_core, or make "
            "fewer clients with data.partition.num_clients"
        )


def _may_replace(path: Path) -> bool:
    return (path / MANIFEST).is_file() or not any(path.iterdir())


def _install(fresh: Path, path: Path) -> None:
    """Two renames; the old folder goes when the new one is in its place."""
    if not path.exists():
        fresh.rename(path)
        return
    old = fresh.with_name(fresh.name + ".old")
    path.rename(old)
    try:
        fresh.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _write_table(file: Path, table: pa.Table) -> str:
    """Writes Parquet with every option that shapes its bytes fixed; returns the sha256."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=1 << 20,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
    )
    return _write(file, sink.getvalue().to_pybytes())


def _write(file: Path, raw: bytes) -> str:
    file.write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def _count_splits(split: np.ndarray) -> dict[str, int]:
    known = np.where(split == LATER, 0, split)
    return dict(zip(_SPLITS, np.bincount(known, minlength=3).tolist(), strict=True))
