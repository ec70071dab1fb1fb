"""A crowd: as many invented users as asked, for runs that measure how training scales.

Few interactions each, over the demo's film titles. The taste model of the demo set is not in it:
nothing can be said about recommendation from this data.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fellray.platform import demo

LENGTH = 12
"""Interactions of one user."""


def write_crowd(file: Path, users: int, seed: int) -> list[str]:
    """A Parquet file of `users` histories; returns the titles. The same seed, the same rows."""
    _, items = demo.make(seed)
    titles = items["title"]
    draw = np.random.default_rng(seed)
    start_U1 = draw.integers(len(titles), size=(users, 1))
    # a stride prime to the number of titles meets every title once before one comes twice
    strides = np.flatnonzero(np.gcd(np.arange(len(titles)), len(titles)) == 1)
    stride_U1 = draw.choice(strides, size=(users, 1))
    item_UT = (start_U1 + stride_U1 * np.arange(LENGTH)) % len(titles)
    place = pa.array(item_UT.ravel())
    table = pa.table(
        {
            "user_id": np.repeat(np.arange(users), LENGTH),
            "item_id": place,
            "title": titles.take(place),
            "timestamp": np.tile(np.arange(1, LENGTH + 1), users),
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".writing")
    pq.write_table(table, written)
    written.rename(file)
    told: list[str] = titles.to_pylist()
    return told
