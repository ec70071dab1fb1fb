"""A crowd: a prepared folder of very many clients of one user each, for runs that measure cost.

    python -m fellray.jobs.crowd FOLDER CLIENTS [--encoder MODEL] [--seed 0]

The people are drawn from the demo model. Beyond `PEOPLE` their histories repeat: what a round costs
does not depend on whether two clients have read the same. Nothing here trains.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fellray.jobs.display import console
from fellray.jobs.prepare import encode_titles
from fellray.jobs.tiny_encoder import make_encoder
from fellray.platform import config as configs
from fellray.platform import demo
from fellray.platform.config import RunConfig
from fellray.platform.data_config import LeaveOneOut
from fellray.platform.encoder import load_backbone
from fellray.platform.interactions import Interactions, split
from fellray.platform.shard_writing import write_shards

PEOPLE = 2000
"""Histories that differ."""


def make_crowd(config: RunConfig, clients: int, seed: int) -> dict[str, Any]:
    """Write the prepared folder `data.path` and return its manifest.

    Args:
        clients: how many; they are called c000000, c000001 ...
    """
    interactions = draw(clients, seed)
    splits = split(interactions, LeaveOneOut())
    names = {f"c{i:06d}": np.array([i]) for i in range(clients)}
    backbone = load_backbone(config.model.name)
    vectors = encode_titles(config, backbone, interactions.items["title"].to_pylist())
    return write_shards(
        config.data, interactions, splits, names, backbone.name, backbone.sha256, vectors
    )


def draw(users: int, seed: int) -> Interactions:
    """The interactions of so many users, numbered from 0."""
    told, items = demo.make(seed, min(users, PEOPLE))
    copies = -(-users // PEOPLE)
    rows = {name: np.tile(told[name].to_numpy(), copies) for name in told.column_names}
    rows["user_id"] += np.repeat(np.arange(copies) * PEOPLE, told.num_rows)
    kept = rows["user_id"] < users
    assert len(np.unique(rows["user_id"][kept])) == users
    return Interactions(
        user_id=rows["user_id"][kept],
        item_id=rows["item_id"][kept],
        timestamp=rows["timestamp"][kept],
        seq=rows["seq"][kept],
        rating=None,
        items=items,
        timestamp_kind="unix_seconds",
    )


def make_small_encoder(folder: Path, blocks: int, width: int) -> Path:
    """A small encoder that knows the demo's titles."""
    _, items = demo.make(0, 1)
    titles: pa.ChunkedArray = items["title"]
    return make_encoder(folder, titles.to_pylist(), blocks, width, 96, 0)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("clients", type=int)
    parser.add_argument("--encoder", default=RunConfig().model.name)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    tree = {
        "data": {"path": str(told.folder), "partition": {"kind": "per_user"}, "k_core": 1},
        "model": {"name": told.encoder},
    }
    manifest = make_crowd(configs.parse(tree, "crowd"), told.clients, told.seed)
    counts = manifest["counts"]
    console.print(
        f"{told.folder}: {counts['users']:,} clients, {counts['interactions']:,} interactions"
    )


if __name__ == "__main__":
    main()
