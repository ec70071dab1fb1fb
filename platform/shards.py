"""The prepared folder, read: every file is checked.

It must not know how it is written, nor models, methods or rounds. Letters: I items, D width
of a vector.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from fellray.platform.errors import FellrayError
from fellray.platform.shard import Shard

VERSION = 1
MANIFEST = "manifest.json"


class Dataset:
    """A prepared folder, opened for reading. Vectors and shards are read when asked for."""

    def __init__(self, path: Path) -> None:
        """Opens the folder and reads its manifest and its items.

        Raises:
            FellrayError: the folder is missing, of another version or damaged.
        """
        self._path = Path(path)
        try:
            raw = (self._path / MANIFEST).read_bytes()
        except OSError:
            raise FellrayError(
                f"{self._path}: is no prepared folder (no {MANIFEST}); run `fellray prepare`, or "
                "point data.path at the folder it wrote"
            ) from None
        self.sha256 = hashlib.sha256(raw).hexdigest()
        """Hash of the manifest, which names the hash of every file: the identity of the data."""
        try:
            self.manifest: dict[str, Any] = json.loads(raw)
            version = self.manifest["version"]
            items, names = self.manifest["items"], sorted(self.manifest["clients"])
        except (ValueError, KeyError, TypeError):
            raise self._damaged(MANIFEST) from None
        if version != VERSION:
            raise FellrayError(
                f"{self._path / MANIFEST}: is version {version}, this fellray reads version "
                f"{VERSION}; run `fellray prepare` again"
            )
        self.clients: tuple[str, ...] = tuple(names)
        table = self._read_table(items)
        self.item_ids: np.ndarray = table["item_id"].to_numpy()
        """int64 [I], ascending"""
        self.titles: list[str] = table["title"].to_pylist()
        self.categories: list[str] = table["categories"].to_pylist()
        self.popularity: np.ndarray = table["popularity"].to_numpy()
        """int64 [I], how often each item occurs in all clients' training splits"""
        named = "source_id" in table.column_names
        self.source_ids: list[str | None] | None = table["source_id"].to_pylist() if named else None
        """What the source calls each item, where it uses text; None where it uses `item_ids`. The
        source does not know items that came later: None."""

    @cached_property
    def vectors(self) -> torch.Tensor:
        """float32 [I, D], unit rows: what the frozen encoder makes of each item."""
        entry = self.manifest["vectors"]
        try:
            return safetensors.torch.load(self._read(entry))["items"]
        except (safetensors.SafetensorError, KeyError):
            raise self._damaged(entry["file"]) from None

    @cached_property
    def users(self) -> pa.Table | None:
        """`user_id` (ascending) and the attributes of every client's users; None where there are
        none."""
        entry = self.manifest.get("users")
        return None if entry is None else self._read_table(entry)

    def shard(self, client: str) -> Shard:
        """One client's interactions.

        Raises:
            FellrayError: as `rows`.
        """
        table = self.rows(client)
        users, starts = np.unique(table["user_id"].to_numpy(), return_index=True)
        return Shard(
            client=client,
            users=users,
            offsets=np.append(starts, table.num_rows).astype(np.int64),
            items=table["item"].to_numpy(),
            splits=table["split"].to_numpy(),
        )

    def rows(self, client: str) -> pa.Table:
        """One client's interactions as they are stored: user_id, item, timestamp, split.

        Raises:
            FellrayError: there is no such client, or its file is missing or damaged.
        """
        if client not in self.manifest["clients"]:
            near = difflib.get_close_matches(client, self.clients, n=1, cutoff=0)[0]
            raise FellrayError(
                f"{self._path}: has no client {client!r}; it has {len(self.clients)} clients, the "
                f"nearest name is {near!r}"
            )
        return self._read_table(self.manifest["clients"][client])

    def _read_table(self, entry: Mapping[str, Any]) -> pa.Table:
        try:
            return pq.read_table(pa.BufferReader(self._read(entry)))
        except pa.ArrowInvalid:
            raise self._damaged(entry["file"]) from None

    def _read(self, entry: Mapping[str, Any]) -> bytes:
        try:
            raw: bytes = (self._path / entry["file"]).read_bytes()
        except OSError:
            raise self._damaged(entry["file"]) from None
        if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            raise self._damaged(entry["file"])
        return raw

    def _damaged(self, file: str) -> FellrayError:
        return FellrayError(
            f"{self._path / file}: is missing, or its bytes are not those that were written; run "
            "`fellray prepare` again"
        )
