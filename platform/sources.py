"""Sources: what each form that people have is opened as, under fellray's column names.

The demo, a folder in fellray's schema and tables with a column map are here; MovieLens, RecBole and
Amazon reviews have files of their own. It must not know what the values are worth: columns are
found and named here, and checked in `interactions`.
"""

import json
from pathlib import Path

from fellray.platform import demo
from fellray.platform.amazon import find_reviews, open_reviews
from fellray.platform.data_config import DataConfig
from fellray.platform.errors import FellrayError
from fellray.platform.movielens import open_movielens
from fellray.platform.recbole import find_interactions, open_atomic
from fellray.platform.tables import (
    Source,
    TimestampKind,
    first_titled,
    pick,
    pick_users,
    read_table,
)

_COLUMNS = ("user_id", "item_id", "title", "timestamp", "rating", "categories")


def open_source(config: DataConfig) -> Source:
    """What `config.source` names: `demo`, a folder or a file, of whichever form it turns out to be.

    Raises:
        FellrayError: a file is missing or unreadable, a column is missing, or the source is of no
            known form.
    """
    for key in config.columns:
        if key not in _COLUMNS:
            raise FellrayError(
                f"data.columns.{key}: fellray knows no such column; known: {', '.join(_COLUMNS)}"
            )
    source = Path(config.source)
    if config.source == "demo":
        _refuse(config, "columns", "items", "users")
        rows, items = demo.make(config.seed)
        return Source(rows, items, "unix_seconds", "demo", "demo")
    if (source / "interactions.parquet").is_file():
        _refuse(config, "columns", "items", "users")
        return _open_folder(source)
    if file := find_interactions(source):
        _refuse(config, "items", "users")
        return open_atomic(file, config.columns)
    if file := find_reviews(source):
        _refuse(config, "columns", "users")
        if source.is_dir():
            _refuse(config, "items")
        return open_reviews(file, config.items)
    if not source.is_dir():
        return _open_file(source, config)
    _refuse(config, "columns", "items", "users")
    if found := open_movielens(source):
        return found
    raise FellrayError(
        f"{source}: a folder given as data.source holds interactions.parquet and items.parquet "
        "(fellray's schema), u.data and u.item (MovieLens ml-100k), ratings.dat and movies.dat "
        "(ml-1m), ratings.csv and movies.csv (ml-32m), one .inter file and its .item (RecBole), or "
        "one .json or .jsonl file and its meta_ file (Amazon reviews, also .gz); neither is there"
    )


def _refuse(config: DataConfig, *settings: str) -> None:
    if given := [f"data.{name}" for name in settings if getattr(config, name)]:
        raise FellrayError(
            f"data.source={config.source}: data.columns and data.items belong to a Parquet or CSV "
            "file, as data.users does (columns also to RecBole's files, items to a file of Amazon "
            f"reviews); leave {' and '.join(given)} out, or give the file itself as data.source"
        )


def _open_folder(folder: Path) -> Source:
    rows_file, items_file = folder / "interactions.parquet", folder / "items.parquet"
    hint = (
        "; a folder needs fellray's own names. For other names give the file as data.source "
        "with data.columns.{0}=<column>"
    )
    raw = read_table(rows_file)
    rows = pick(raw, rows_file, ("user_id", "item_id", "timestamp", "seq"), ("rating",), {}, hint)
    items = pick(
        read_table(items_file), items_file, ("item_id", "title"), ("categories",), {}, hint
    )
    users_file = _find_users(folder)
    users = pick_users(read_table(users_file), users_file, {}) if users_file else None
    kind = ((raw.schema.metadata or {}).get(b"timestamp_kind") or b"").decode()
    if not kind:
        kind = _kind_from_meta(folder / "meta.json")
    kind = kind.replace(" ", "_")
    files = (str(rows_file), str(items_file))
    if kind == "unix_seconds":
        return Source(rows, items, "unix_seconds", *files, users, str(users_file))
    if kind == "order_only":
        return Source(rows, items, "order_only", *files, users, str(users_file))
    raise FellrayError(
        f"{rows_file}: timestamp_kind is {kind!r}; write 'unix_seconds' or 'order_only' into the "
        f"Parquet file's metadata or into {folder / 'meta.json'} under that key"
    )


def _find_users(folder: Path) -> Path | None:
    files = (folder / name for name in ("users.parquet", "users.csv"))
    return next((file for file in files if file.is_file()), None)


def _kind_from_meta(file: Path) -> str:
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise FellrayError(f"{file}: is not readable JSON ({error}); mend or remove it") from None
    return str(meta.get("timestamp_kind", "")) if isinstance(meta, dict) else ""


def _open_file(file: Path, config: DataConfig) -> Source:
    names = config.columns
    hint = "; name the right one with data.columns.{0}=<column>"
    text = [names.get(key, key) for key in ("title", "categories")]
    raw = read_table(file, text=text)
    if config.items is None:
        rows = pick(raw, file, ("user_id", "item_id"), ("timestamp", "rating"), names, hint)
        hint += ", or name a file of items with data.items=<file>"
        items = pick(raw, file, ("item_id", "title"), ("categories",), names, hint)
        items = first_titled(items)
    else:
        of_rows = {k: v for k, v in names.items() if k not in ("title", "categories")}
        rows = pick(raw, file, ("user_id", "item_id"), ("timestamp", "rating"), of_rows, hint)
        raw = read_table(config.items, text=text)
        of_items = {k: v for k, v in names.items() if k in ("title", "categories")}
        # The two files may call their item ids differently; then this one uses fellray's name.
        if names.get("item_id") in raw.column_names:
            of_items["item_id"] = names["item_id"]
        wanted = ("item_id", "title")
        items = pick(raw, config.items, wanted, ("categories",), of_items, hint)
    kind: TimestampKind = "unix_seconds" if "timestamp" in rows.column_names else "order_only"
    users = None
    if config.users is not None:
        users = pick_users(read_table(config.users), config.users, names)
    files = (str(file), str(config.items or file))
    return Source(rows, items, kind, *files, users, str(config.users or ""))
