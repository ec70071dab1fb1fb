"""The prepared folder of a run on attributes: written once, read by clients.

It holds `attributes.json` (features, groups, counts), `clicks.safetensors`
(samples of all users, one user after the other) and `backbone.safetensors`. A client actor reads
the rows of its own clients only. This file must not know how a model is trained.

Letters: U users, I items, N samples, F features.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fellray.platform.attribute_model import Backbone, read_backbone
from fellray.platform.attributes import AttributeConfig
from fellray.platform.clicks import TEST, TRAIN, VALID, Clicks, split_clicks
from fellray.platform.errors import FellrayError
from fellray.platform.features import read_feature

MANIFEST, SAMPLES, BACKBONE = "attributes.json", "clicks.safetensors", "backbone.safetensors"


class ClickData:
    """The prepared folder of a run on attributes."""

    def __init__(self, path: Path):
        """Raises: FellrayError: the folder is not there, or not prepared for attributes."""
        self.path = path
        try:
            raw = (path / MANIFEST).read_bytes()
        except OSError:
            raise FellrayError(
                f"{path}: holds no {MANIFEST}: run `fellray prepare` with the same config first"
            ) from None
        self.manifest: dict[str, Any] = json.loads(raw)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.user_features, self.item_features = (
            tuple(read_feature(tree) for tree in self.manifest[side])
            for side in ("user_features", "item_features")
        )
        ids = self.manifest["clients"]
        width = len(str(max(ids)))
        self.clients = tuple(f"u{number:0{width}d}" for number in ids)
        """Sorted, as the samples lie."""

    def backbone(self) -> Backbone:
        """What clients adapt.

        Raises:
            FellrayError: the file is damaged or does not fit the features.
        """
        file = self.path / BACKBONE
        try:
            raw = file.read_bytes()
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise FellrayError(f"{file}: cannot be read ({error}); prepare again") from None
        if hashlib.sha256(raw).hexdigest() != self.manifest["backbone_sha256"]:
            raise FellrayError(f"{file}: is not what was prepared; run `fellray prepare` again")
        return read_backbone(
            tensors,
            [f.name for f in self.user_features],
            [f.name for f in self.item_features],
            str(file),
        )

    def users(self) -> Tensor:
        """int32 codes [U, F] of all clients: public, as FedPA's server knows the groups."""
        return self._open_all("users")

    def items(self) -> Tensor:
        """int32 codes [I, F] of all items."""
        return self._open_all("items")

    def sizes(self) -> np.ndarray:
        """int64 [U]: training samples of each client."""
        return np.asarray(self.manifest["train_sizes"], np.int64)

    def samples(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Samples of the clients first..last-1: `item`, `label`, `split`, and their `ends`."""
        with safe_open(self.path / SAMPLES, "pt") as file:
            ends = file.get_tensor("ends").numpy()
            a, b = (int(ends[at - 1]) if at else 0 for at in (first, last))
            found = {n: file.get_slice(n)[a:b].numpy() for n in ("item", "label", "split")}
        return {**found, "ends": ends[first:last] - a}

    def _open_all(self, name: str) -> Tensor:
        with safe_open(self.path / SAMPLES, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def write_clicks(
    path: Path,
    clicks: Clicks,
    config: AttributeConfig,
    backbone: Backbone,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write the prepared folder; the manifest comes last, so a torn folder is none.

    Args:
        facts: more for the manifest.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)
    own = ~clicks.open_U
    sizes = np.diff(clicks.ends_U, prepend=0)
    of_clients = np.repeat(own, sizes)
    ends = np.cumsum(sizes[own])
    split = split_clicks(ends, config.valid, config.test)
    user = np.repeat(np.arange(len(ends)), sizes[own])
    arrays = {
        "item": clicks.item_N[of_clients],
        "label": clicks.label_N[of_clients],
        "split": split,
        "ends": ends,
        "users": clicks.users_UF[own],
        "items": clicks.items_IF,
    }
    _save(path / SAMPLES, {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()})
    weights = _save(path / BACKBONE, name_tensors(backbone, clicks))
    manifest = {
        "version": 1,
        "user_features": [f.tree() for f in clicks.user_features],
        "item_features": [f.tree() for f in clicks.item_features],
        "clients": clicks.user_id_U[own].tolist(),
        "train_sizes": np.bincount(user, split == TRAIN, len(ends)).astype(int).tolist(),
        "counts": {
            "users": len(sizes),
            "open_users": int(clicks.open_U.sum()),
            "clients": len(ends),
            "items": len(clicks.items_IF),
            "interactions": len(clicks.label_N),
            **{
                name: int((split == part).sum())
                for name, part in (("train", TRAIN), ("valid", VALID), ("test", TEST))
            },
        },
        "samples_sha256": hashlib.sha256((path / SAMPLES).read_bytes()).hexdigest(),
        "backbone_sha256": weights,
        **facts,
    }
    temporary = path / f".{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path / MANIFEST)
    return manifest


def name_tensors(backbone: Backbone, clicks: Clicks) -> dict[str, Tensor]:
    """A backbone's tensors under its features' names."""
    return backbone.tensors(
        [f.name for f in clicks.user_features], [f.name for f in clicks.item_features]
    )


def _save(file: Path, tensors: dict[str, Tensor]) -> str:
    temporary = file.with_name(f".{file.name}.tmp")
    save_file(tensors, temporary)
    temporary.rename(file)
    return hashlib.sha256(file.read_bytes()).hexdigest()
