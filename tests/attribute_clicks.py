"""Clicks with attributes, made on the spot: who clicks follows from a stated model."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fellray.platform import config as configs
from fellray.platform.config import RunConfig

AGES = ("18-", "18-30", "31-50", "51+")


def write_source(folder: Path, users: int = 60, items: int = 40) -> Path:
    """A folder of 60 users who have 6 to 40 interactions each; two of them are `18-`."""
    draw = np.random.default_rng(5)
    folder.mkdir(parents=True)
    age = draw.integers(1, 4, users)
    age[[3, 17]] = 0
    city = draw.integers(0, 3, users)
    kind, price = draw.integers(0, 4, items), draw.lognormal(3, 1, items)
    city_column = pa.array(city.astype(float)).to_pylist()
    city_column[5] = None
    pq.write_table(
        pa.table(
            {
                "user_id": np.arange(users) + 100,
                "age": [AGES[a] for a in age],
                "city": pa.array(city_column, pa.float32()),
            }
        ),
        folder / "users.parquet",
    )
    pq.write_table(
        pa.table({"item_id": np.arange(items), "kind": kind, "price": price}),
        folder / "items.parquet",
    )
    counts = draw.integers(6, 41, users)
    user = np.repeat(np.arange(users), counts)
    item = draw.integers(0, items, len(user))
    taste, bias = draw.normal(0, 1, (4, 4)), draw.normal(0, 1.5, users)
    logit = taste[age[user], kind[item]] + bias[user]
    label = draw.random(len(user)) < 1 / (1 + np.exp(-logit))
    pq.write_table(
        pa.table(
            {
                "user_id": user + 100,
                "item_id": item,
                "timestamp": draw.permutation(len(user)),
                "label": label.astype(np.int8),
            }
        ),
        folder / "interactions.parquet",
    )
    return folder


def make_config(source: Path, place: Path, **more: Any) -> RunConfig:
    """A small run: two groups' attributes, two rounds, everybody in one actor."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "storage": str(place / "runs"),
        "data": {"path": str(source.parent / "prepared"), "source": str(source)},
        "attributes": {
            "users": ["age", "city"],
            "items": ["kind", "price"],
            "bins": {"price": {"low": 1, "high": 5, "edges": 6}},
            "open": {"inside": 0.3},
            "dim": 3,
            "layers": [16, 8],
            "epochs": 6,
            "learning_rate": 0.01,
            "batch_size": 64,
            "baseline": False,
        },
        "method": {
            "kind": "fedpa",
            "groups": ["age", "city"],
            "min_group_size": 3,
            "rank": 2,
            "gate_dim": [3, 2],
        },
        "train": {"rounds": 2},
        "clients": {"per_actor": 100},
        "evaluation": {"select": "auc"},
    }
    for section, values in more.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return configs.parse(tree, "test")
