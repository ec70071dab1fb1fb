"""Prepare: interactions in, one Parquet shard per client out, with the items' frozen vectors."""

import sys
from typing import Any

import numpy as np
from rich.progress import track

from fellray.jobs.attributes import prepare_attributes
from fellray.platform import config as configs
from fellray.platform import grounding
from fellray.platform.config import RunConfig
from fellray.platform.encoder import Backbone, load_backbone, load_tokenizer, tokenize
from fellray.platform.interactions import read, split
from fellray.platform.item_vectors import ROWS, embed
from fellray.platform.partition import partition
from fellray.platform.script import Script, load_wording
from fellray.platform.shard_writing import write_shards
from fellray.platform.split import cut_model


def prepare(config: RunConfig) -> dict[str, Any]:
    """Write the folder `data.path` and return its manifest."""
    if config.attributes is not None:
        return prepare_attributes(config)
    interactions = read(config.data)
    splits = split(interactions, config.data.split)
    clients = partition(
        config.data.partition,
        interactions.user_id,
        interactions.item_id,
        splits,
        config.data.seed,
        interactions.users,
        interactions.items,
    )
    backbone = load_backbone(config.model.name)
    vectors = encode_titles(config, backbone, interactions.items["title"].to_pylist())
    return write_shards(
        config.data, interactions, splits, clients, backbone.name, backbone.sha256, vectors
    )


def encode_titles(config: RunConfig, backbone: Backbone, titles: list[str]) -> np.ndarray:
    """Unit vectors [titles, d] of the whole frozen encoder, or a decoder's embeddings of titles."""
    model = config.model
    parts = cut_model(backbone, model)
    rows = ROWS
    if backbone.generative:
        wording, rows = load_wording(backbone), grounding.ROWS
        ids = Script(wording, model, titles).titles(titles)
        batches = grounding.embed_titles(parts, ids, model.pad_multiple, wording.pad)
    else:
        tokens = tokenize(load_tokenizer(model.name), titles, model.max_tokens)
        batches = embed(parts, tokens, model)
    total = -(-len(titles) // rows)
    shown = track(batches, total=total, description="Item vectors", transient=True)
    return np.concatenate(list(shown))


def main() -> None:
    """`python jobs/prepare.py CONFIG [key=value ...]`, also under `ray job submit`."""
    path, *overrides = sys.argv[1:]
    prepare(configs.load(path, overrides))


if __name__ == "__main__":
    main()
