"""Clicks: users' and items' attributes, who clicked what, read from a folder of Parquet files.

It must not know which clients there are, nor how a model is trained.

Letters: U users, I items, N samples, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fellray.platform.attributes import AttributeConfig
from fellray.platform.data_config import DataConfig
from fellray.platform.errors import FellrayError
from fellray.platform.features import Feature, encode, learn_features

SPLITS = TRAIN, VALID, TEST = 0, 1, 2


@dataclass(frozen=True)
class Clicks:
    """All samples of a source, coded; users sorted by id, a user's samples by time."""

    user_features: tuple[Feature, ...]
    item_features: tuple[Feature, ...]
    user_id_U: np.ndarray
    users_UF: np.ndarray
    """int32 codes."""
    items_IF: np.ndarray
    """int32 codes."""
    ends_U: np.ndarray
    """int64: where each user's samples end."""
    item_N: np.ndarray
    """int32: a row of `items_IF`."""
    label_N: np.ndarray
    """uint8"""
    open_U: np.ndarray
    """bool: pre-training may read the user."""

    def users_of_samples(self) -> np.ndarray:
        """int64 [N]: whose each sample is."""
        return np.repeat(np.arange(len(self.ends_U)), np.diff(self.ends_U, prepend=0))


def read_clicks(config: AttributeConfig, data: DataConfig) -> Clicks:
    """Read `data.source`.

    Raises:
        FellrayError: a file or a column is missing, a label is neither 0 nor 1, a user or an item
            has no attributes, `open.values` names no value, or nobody is left on one side.
    """
    folder = Path(data.source)
    names = ("interactions", "users", "items")
    tables = {name: _read(folder / f"{name}.parquet") for name in names}
    where = {name: f"{folder}/{name}.parquet" for name in names}
    # from all rows: nothing is unseen, and what open users never meet stays as its table began
    user_features = learn_features(tables["users"], config.users, config.bins, where["users"])
    item_features = learn_features(tables["items"], config.items, config.bins, where["items"])
    rows = tables["interactions"]
    user_id, item_id, time, label = (
        _numbers(rows, name, where["interactions"])
        for name in ("user_id", "item_id", "timestamp", "label")
    )
    if not np.isin(label, (0, 1)).all():
        raise FellrayError(
            f"{where['interactions']}: column 'label' must be 0 or 1 (clicked), and holds "
            f"{label[~np.isin(label, (0, 1))][0]}"
        )
    known, user_N = _join(tables["users"], "user_id", user_id, where)
    stock, item_N = _join(tables["items"], "item_id", item_id, where)
    met, user_N = np.unique(user_N, return_inverse=True)
    order = np.lexsort((np.arange(len(time)), time, user_N))
    user_table = tables["users"].take(pa.array(known[met]))
    return Clicks(
        user_features,
        item_features,
        user_table["user_id"].to_numpy(),
        encode(user_features, user_table, where["users"]),
        encode(item_features, tables["items"].take(pa.array(stock)), where["items"]),
        np.cumsum(np.bincount(user_N, minlength=len(met))),
        item_N[order].astype(np.int32),
        label[order].astype(np.uint8),
        _open(config, user_features, encode(user_features, user_table, ""), data.seed),
    )


def split_clicks(ends_U: np.ndarray, valid: float, test: float) -> np.ndarray:
    """uint8 [N]: 0 training, 1 validation, 2 test, by time within each user.

    The newest floor(test * n) samples are the test, floor(valid * n) before them validation.
    """
    sizes = np.diff(ends_U, prepend=0)
    from_end = np.repeat(ends_U, sizes) - 1 - np.arange(int(sizes.sum()))
    tested = np.floor(sizes * test + 1e-9).astype(np.int64)
    held = tested + np.floor(sizes * valid + 1e-9).astype(np.int64)
    labels = np.where(from_end < np.repeat(held, sizes), VALID, TRAIN)
    return np.where(from_end < np.repeat(tested, sizes), TEST, labels).astype(np.uint8)


def _open(
    config: AttributeConfig, features: Sequence[Feature], users_UF: np.ndarray, seed: int
) -> np.ndarray:
    """Which users are open: a seeded share of those with a named value, and of the others."""
    rule = config.open
    likely = np.ones(len(users_UF), bool)
    if rule.attribute is not None:
        at = [f.name for f in features].index(rule.attribute)
        values = list(features[at].values)
        if strangers := [value for value in rule.values if value not in values]:
            raise FellrayError(
                f"attributes.open.values names {strangers[0]!r}, but no user has it as "
                f"{rule.attribute}; there are {', '.join(map(str, values))}"
            )
        likely = np.isin(users_UF[:, at], [values.index(value) for value in rule.values])
    draw = np.random.default_rng(seed)
    found = np.zeros(len(users_UF), bool)
    for here, share in ((likely, rule.inside), (~likely, rule.outside)):
        members = np.flatnonzero(here)
        found[draw.permutation(members)[: int(share * len(members))]] = True
    if found.sum() < 2 or found.all():
        raise FellrayError(
            f"attributes.open leaves {found.sum()} open users and {(~found).sum()} clients of "
            f"{len(found)}; change open.inside and open.outside so that both sides have some"
        )
    return found


def _read(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise FellrayError(
            f"{file}: cannot be read ({error}); data.source of a run on attributes is a folder "
            "with interactions.parquet, users.parquet and items.parquet"
        ) from None


def _numbers(table: pa.Table, name: str, where: str) -> np.ndarray:
    if name not in table.column_names:
        raise FellrayError(
            f"{where}: has no column {name!r}; a run on attributes needs user_id, item_id, "
            f"timestamp and label (1 where clicked), and it has {', '.join(table.column_names)}"
        )
    column = table[name]
    if column.null_count or not pa.types.is_integer(column.type):
        raise FellrayError(f"{where}: column {name!r} must hold whole numbers and no gaps")
    values: np.ndarray = column.to_numpy()
    return values


def _join(
    table: pa.Table, key: str, ids_N: np.ndarray, where: dict[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the table sorted by id, and the place of each sample's id among them."""
    file = where["users" if key == "user_id" else "items"]
    ids = _numbers(table, key, file)
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    if len(twice := ordered[1:][ordered[1:] == ordered[:-1]]):
        raise FellrayError(f"{file}: {key} {twice[0]} occurs more than once; keep one row of it")
    place = np.searchsorted(ordered, ids_N)
    missing = ordered[np.minimum(place, len(ordered) - 1)] != ids_N
    if missing.any():
        raise FellrayError(
            f"{where['interactions']}: {key} {ids_N[missing][0]} has no row in {file} "
            f"({missing.sum()} interactions); add its attributes there, or remove them"
        )
    return order, place
