"""Features: columns of a table as numbers of categories, learnt once and used ever after.

A missing value is a category of its own where the tables that were learnt from have one. A value
that was not among them is *unseen*: its code is -1, and the model reads the mean of the feature's
rows for it. This file must not know users from items, nor what a model makes of a code.

Letters: N rows of a table, F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fellray.platform.attributes import Bins
from fellray.platform.errors import FellrayError

UNSEEN = -1
"""Code of a value that was not there when the feature was learnt."""


@dataclass(frozen=True)
class Feature:
    """One column, and what its values are called."""

    name: str
    values: tuple[str | None, ...] = ()
    """Categories as text, by their code; None, which comes first, is a missing value."""
    bins: Bins | None = None
    """Instead of categories: where numbers are cut."""

    @property
    def rows(self) -> int:
        """How many codes there are."""
        return self.bins.edges + 1 if self.bins else len(self.values)

    def code(self, column: pa.ChunkedArray, where: str) -> np.ndarray:
        """int32 codes [N] of a column; `UNSEEN` where a value has none.

        Raises:
            FellrayError: a column with bins holds no numbers.
        """
        if self.bins is None:
            known = pa.array(self.values, pa.string())
            found = pc.index_in(_as_text(column), value_set=known)
            codes: np.ndarray = found.fill_null(UNSEEN).to_numpy().astype(np.int32)
            return codes
        _check_number(column, where, self.name)
        values = pc.cast(column, pa.float64()).fill_null(0.0).to_numpy()
        edges = np.linspace(self.bins.low, self.bins.high, self.bins.edges)
        logs = np.log1p(np.maximum(np.nan_to_num(values), 0.0))
        binned: np.ndarray = np.digitize(logs, edges).astype(np.int32)
        return binned

    def tree(self) -> dict[str, object]:
        """As plain JSON data; `read_feature` reads it."""
        bins = self.bins.model_dump() if self.bins else None
        return {"name": self.name, "values": list(self.values), "bins": bins}


def read_feature(tree: Mapping[str, object]) -> Feature:
    """A feature from what `Feature.tree` gave."""
    values, bins = tree["values"], tree["bins"]
    assert isinstance(values, list)
    return Feature(
        str(tree["name"]), tuple(values), Bins.model_validate(bins) if bins is not None else None
    )


def learn_features(
    table: pa.Table, names: Sequence[str], bins: Mapping[str, Bins], where: str
) -> tuple[Feature, ...]:
    """Features of a table: the sorted values of each column, or the bins that are given for it.

    Raises:
        FellrayError: a column that has no bins is missing.
    """
    learnt = []
    for name in names:
        if name in bins:
            learnt.append(Feature(name, bins=bins[name]))
            continue
        column = _column(table, name, where)
        distinct = pc.unique(column)
        present = distinct.drop_null()
        ordered = present.take(pc.sort_indices(present))
        empty: tuple[None, ...] = (None,) if len(present) < len(distinct) else ()
        learnt.append(Feature(name, (*empty, *_as_text(ordered).to_pylist())))
    return tuple(learnt)


def encode(features: Sequence[Feature], table: pa.Table, where: str) -> np.ndarray:
    """int32 codes [N, F] of a table's rows; see `Feature.code`.

    Raises:
        FellrayError: a column is missing; the table's own columns are named.
    """
    columns = [f.code(_column(table, f.name, where), where) for f in features]
    return np.stack(columns, axis=1)


def _column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise FellrayError(
            f"{where}: has no column {name!r}, which attributes names as a feature; it has "
            f"{', '.join(table.column_names)}: add the column, or leave the feature out"
        )
    return table[name]


def _check_number(column: pa.ChunkedArray, where: str, name: str) -> None:
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise FellrayError(
            f"{where}: column {name!r} is {column.type}, but attributes.bins cuts numbers; give "
            "numbers there, or leave its bins out to read categories"
        )


def _as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The same category is the same text, whether a file has it as 3 or as 3.0."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_floating(column.type):
        whole = pc.fill_null(pc.equal(column, pc.round(column)), True)
        if pc.all(whole).as_py():
            column = pc.cast(column, pa.int64())
    return pc.cast(column, pa.string())
