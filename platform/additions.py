"""Items that came after the training, on storage: numbered files that are written whole and once.

    items/000001.safetensors      vectors float32 [J, d], and a header with the rest

The vectors are stored, not made again, so that all replicas have the same bits. It must not
know who adds items, nor who recommends or trains on them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.torch
import torch

from fellray.platform.errors import FellrayError
from fellray.platform.storage import Storage
from fellray.platform.strict_json import to_json

FOLDER = "items"
LOCK = "items"
_VERSION = 1
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Batch:
    """Items that came together; J of them."""

    ids: np.ndarray
    """int64 [J]"""
    titles: Sequence[str]
    categories: Sequence[Sequence[str]]
    vectors: torch.Tensor
    """float32 [J, d], unit rows: what the frozen encoder makes of the titles."""


def list_batches(storage: Storage) -> list[str]:
    """Names of what a run's folder holds, oldest first."""
    return [name for name in storage.list(FOLDER) if name.endswith(_SUFFIX)]


def read_batches(storage: Storage, names: Sequence[str], encoder: str, dim: int) -> Batch:
    """At least one, joined in the order of their names.

    Raises:
        FellrayError: as `read_batch`.
    """
    batches = [read_batch(storage, name, encoder, dim) for name in names]
    return Batch(
        np.concatenate([batch.ids for batch in batches]),
        [title for batch in batches for title in batch.titles],
        [own for batch in batches for own in batch.categories],
        torch.cat([batch.vectors for batch in batches]),
    )


def read_batch(storage: Storage, name: str, encoder: str, dim: int) -> Batch:
    """Args: encoder: sha256 of the weights that made the items' vectors. dim: their width.

    Raises:
        FellrayError: the file is gone, damaged, or another encoder's.
    """
    path = f"{FOLDER}/{name}"
    try:
        raw = storage.read(path)
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])["__metadata__"]
        tree = json.loads(header["items"])
        ids = np.array([one["item_id"] for one in tree["items"]], np.int64)
        titles = [str(one["title"]) for one in tree["items"]]
        categories = [tuple(map(str, one["categories"])) for one in tree["items"]]
        made_with, version = tree["encoder"], tree["version"]
        vectors = safetensors.torch.load(raw)["vectors"]
        if version != _VERSION or vectors.dtype != torch.float32:
            raise ValueError
        if vectors.shape != (len(ids), dim) or not torch.isfinite(vectors).all():
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError, safetensors.SafetensorError):
        raise FellrayError(
            f"{storage}/{path}: is damaged; delete it and send its items again"
        ) from None
    if made_with != encoder:
        raise FellrayError(
            f"{storage}/{path}: was made with another encoder ({made_with[:12]}) than the run's "
            f"items ({encoder[:12]}); delete it and send its items again"
        )
    return Batch(ids, titles, categories, vectors)


def write_batch(storage: Storage, batch: Batch, encoder: str) -> str:
    """Add a file behind the others, whoever holds the lock; its name.

    Raises:
        FellrayError: it cannot be written.
    """
    held = list_batches(storage)
    name = f"{int(held[-1].removesuffix(_SUFFIX)) + 1 if held else 1:06d}{_SUFFIX}"
    items = [
        {"item_id": int(item), "title": title, "categories": list(own)}
        for item, title, own in zip(batch.ids, batch.titles, batch.categories, strict=True)
    ]
    tree = {"version": _VERSION, "encoder": encoder, "items": items}
    header = {"items": to_json(tree, f"{storage}/{FOLDER}/{name}")}
    raw = safetensors.torch.save({"vectors": batch.vectors.contiguous()}, header)
    storage.write(f"{FOLDER}/{name}", raw)
    return name
