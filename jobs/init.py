"""Init: a first config, with the columns of the user's own file mapped where they can be."""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from fellray.platform.errors import FellrayError

MEANINGS = {
    "user_id": ("user", "customer", "client", "member", "reviewer", "buyer", "account", "uid"),
    "item_id": (
        *("item", "product", "article", "movie", "film", "book", "track", "iid"),
        *("asin", "sku", "isbn", "ean", "gtin"),
    ),
    "title": ("title", "name"),
    "timestamp": ("timestamp", "time", "date", "datetime", "ts", "at", "unixreviewtime"),
    "rating": ("rating", "score", "stars", "overall"),
    "categories": ("categories", "category", "genres", "genre"),
}
"""What columns are usually called: a thing's id by the thing, anything else by its last word."""
IDS = ("user_id", "item_id")
NEEDED = (*IDS, "title")
UNKNOWN = "?"
"""Stands in a config for the column that its reader must name."""

TEMPLATE = """\
# A fellray run. Every setting has a default; `fellray train --help` shows how to override one.
name: {name}
seed: 0
storage: runs                  # a folder, or a URI such as s3://bucket/runs

data:
  path: data/{name}            # fellray prepare writes it
  source: {source}
{mapping}  k_core: 5                    # drop users and items with fewer interactions
  split: {{kind: leave_one_out}} # or {{kind: temporal, valid: 0.1, test: 0.1}}
  partition: {{kind: kmeans, num_clients: 5}}   # per_user, by_attribute, dirichlet

model:
  name: all-MiniLM-L6-v2       # or any BERT-family encoder by name or path
  cut: 1                       # blocks 0..cut-1 stay with the client
  top: 1                       # so do the last ones
  lora: {{r: 8, lora_alpha: 16, target_modules: [query, value]}}

method: {{kind: fellrec}}        # or fedavg, fedprox, ditto, local, ...: see README

train:
  rounds: 10
  local_samples: 96            # histories one client reads in a round
  batch_size: 16
  learning_rate: 0.003

clients:
  per_actor: 5                 # clients that share a process (about 600 MiB each), or auto
  gpu_denominator: 0           # n: a client actor takes 1/n of a GPU

server:
  engine: deepspeed
"""


def write_config(path: Path, source: str, items: Path | None) -> dict[str, str]:
    """Write a config for the demo, a data folder or a file.

    Returns:
        fellray's names -> the file's columns, `UNKNOWN` for a needed one that was not recognised;
        empty where the source is no single table.

    Raises:
        FellrayError: the file exists already or cannot be written, or the source cannot be read.
    """
    from fellray.platform.amazon import find_reviews
    from fellray.platform.recbole import find_interactions

    if path.exists():
        raise FellrayError(f"{path}: exists already; choose another name or remove it")
    mapping = ""
    columns: dict[str, str] = {}
    file = Path(source)
    if source != "demo" and not file.exists():
        raise FellrayError(f"--source {source}: there is no such file or folder")
    if find_interactions(file) or find_reviews(file):  # forms whose columns are known
        if items is not None:
            mapping += f"  items: {_quote(str(items))}\n"
    elif file.is_file():
        columns = match_columns(read_columns(file))
        if items is not None:
            of_items = match_columns(read_columns(items))
            columns |= {k: v for k, v in of_items.items() if k in ("title", "categories")}
            mapping += f"  items: {json.dumps(str(items))}\n"
        columns = dict.fromkeys(NEEDED, UNKNOWN) | columns
        pairs = ", ".join(f"{k}: {_quote(v)}" for k, v in columns.items())
        mapping += f"  columns: {{{pairs}}}\n"
    stem = re.sub(r"\.jsonl?$", "", file.stem)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") if source != "demo" else "demo"
    text = TEMPLATE.format(name=name or "run", source=_quote(source), mapping=mapping)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FellrayError(f"{path}: cannot be written ({error.strerror})") from None
    return columns


def match_columns(columns: list[str]) -> dict[str, str]:
    """fellray's names -> the file's columns, by their usual names; each column once."""
    found: dict[str, str] = {}
    for match in (_match_whole, _match_last_word, _match_nearly):
        for ours, usual in MEANINGS.items():
            free = [column for column in columns if column not in found.values()]
            if ours not in found and (column := match(ours, usual, free)):
                found[ours] = column
    return {ours: found[ours] for ours in MEANINGS if ours in found}


def _match_whole(ours: str, usual: Sequence[str], columns: Sequence[str]) -> str | None:
    plain = {"".join(_words(column, ours)): column for column in reversed(columns)}
    return next((plain[name] for name in usual if name in plain), None)


def _match_last_word(ours: str, usual: Sequence[str], columns: Sequence[str]) -> str | None:
    for column in columns:
        words = _words(column, ours)
        of_a_person = ours == "title" and words[:1] and words[0] in MEANINGS["user_id"]
        if words and words[-1] in usual and not of_a_person:
            return column
    return None


def _match_nearly(ours: str, usual: Sequence[str], columns: Sequence[str]) -> str | None:
    plain = {"".join(_words(column, ours)): column for column in reversed(columns)}
    near = (plain[n] for name in usual for n in difflib.get_close_matches(name, plain, 1, 0.85))
    return next(near, None)


def _words(column: str, ours: str) -> list[str]:
    """`bookTitle` -> book, title; an id's column without its `id`."""
    words = re.findall(r"[^\W_]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", column).lower())
    if ours not in IDS or not words:
        return words
    return [*words[:-1], *filter(None, [words[-1].removesuffix("id")])]


def _quote(text: str) -> str:
    """As YAML between quotes, letters of every language as they are."""
    return json.dumps(text, ensure_ascii=False)


def read_columns(file: Path) -> list[str]:
    """A Parquet or CSV file's column names.

    Raises:
        FellrayError: it is neither.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    from fellray.platform.tables import find_delimiter

    try:
        if file.suffix in (".parquet", ".pq"):
            return list(pq.read_schema(file).names)
        options = pyarrow.csv.ParseOptions(delimiter=find_delimiter(file), newlines_in_values=True)
        with pyarrow.csv.open_csv(file, parse_options=options) as reader:
            return list(reader.schema.names)
    except FileNotFoundError:
        raise FellrayError(f"{file}: there is no such file") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise FellrayError(f"{file}: is neither Parquet nor CSV with a header ({error})") from None
