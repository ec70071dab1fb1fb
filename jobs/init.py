"""Init: a first config, with the columns of the user's own file mapped where they can be."""

import difflib
import json
from pathlib import Path

from fellray.platform.errors import FellrayError

MEANINGS = {
    "user_id": ("user_id", "user", "userid", "uid", "customer", "reviewerid", "member"),
    "item_id": ("item_id", "item", "itemid", "iid", "movieid", "product", "asin", "sku", "book_id"),
    "title": ("title", "name", "item_name", "product_name"),
    "timestamp": ("timestamp", "time", "ts", "date", "unixreviewtime"),
    "rating": ("rating", "score", "stars", "overall"),
    "categories": ("categories", "genres", "category", "genre"),
}
NEEDED = ("user_id", "item_id")

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
  partition: {{kind: kmeans, num_clients: 5}}   # or {{kind: per_user}}

model:
  name: all-MiniLM-L6-v2       # or any BERT-family encoder by name or path
  cut: 1                       # blocks 0..cut-1 stay with the client
  top: 1                       # so do the last ones
  lora: {{r: 8, lora_alpha: 16, target_modules: [query, value]}}

method: {{kind: fellrec}}        # fedavg, local, central, or file (your own)

train:
  rounds: 10
  local_samples: 96            # histories one client reads in a round
  batch_size: 16
  learning_rate: 0.003

clients:
  per_actor: 5                 # clients that share a process (about 600 MiB each)
  gpu_denominator: 0           # n: a client actor takes 1/n of a GPU

server:
  engine: deepspeed
"""


def write_config(path: Path, source: str, items: Path | None) -> None:
    """Write a config for the demo, a data folder, or a CSV or Parquet file.

    Raises:
        FellrayError: the file exists already, or the source's columns cannot be read or mapped.
    """
    if path.exists():
        raise FellrayError(f"{path}: exists already; choose another name or remove it")
    mapping = ""
    file = Path(source)
    if source != "demo" and not file.exists():
        raise FellrayError(f"--source {source}: there is no such file or folder")
    if file.is_file():
        found = match_columns(read_columns(file))
        if items is not None:
            of_items = match_columns(read_columns(items))
            found |= {k: v for k, v in of_items.items() if k in ("title", "categories")}
            mapping += f"  items: {json.dumps(str(items))}\n"
        if missing := [name for name in NEEDED if name not in found]:
            raise FellrayError(
                f"{file}: no column looks like {' or '.join(missing)} among "
                f"{', '.join(read_columns(file))}; rename it, or write data.columns yourself"
            )
        pairs = ", ".join(f"{k}: {json.dumps(v)}" for k, v in found.items())
        mapping += f"  columns: {{{pairs}}}\n"
    name = file.stem if source != "demo" else "demo"
    text = TEMPLATE.format(name=name or "run", source=json.dumps(source), mapping=mapping)
    path.write_text(text, encoding="utf-8")


def match_columns(columns: list[str]) -> dict[str, str]:
    """fellray's names -> the file's columns, by their usual names; each column once."""
    plain = {column.lower().replace(" ", "_"): column for column in columns}
    found: dict[str, str] = {}
    for ours, usual in MEANINGS.items():
        exact = [plain[name] for name in usual if name in plain]
        near = [plain[n] for name in usual for n in difflib.get_close_matches(name, plain, 1, 0.85)]
        for column in exact + near:
            if column not in found.values():
                found[ours] = column
                break
    return found


def read_columns(file: Path) -> list[str]:
    """A Parquet or CSV file's column names.

    Raises:
        FellrayError: it is neither.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            return list(pq.read_schema(file).names)
        with pyarrow.csv.open_csv(file) as reader:
            return list(reader.schema.names)
    except (OSError, pa.ArrowInvalid) as error:
        raise FellrayError(f"{file}: is neither Parquet nor CSV with a header ({error})") from None
