"""Item vectors: what the whole frozen encoder makes of titles.

Nobody trains them, so a title has the same vector for every client and in every round. It must not
know where titles come from, nor who keeps the vectors.
"""

from collections.abc import Iterator

import numpy as np

from fellray.platform.encoder import Tokens
from fellray.platform.model_config import ModelConfig
from fellray.platform.reader import assemble
from fellray.platform.rows import Rows
from fellray.platform.split import Parts
from fellray.platform.tower import encode_texts

ROWS = 256
"""Titles in one forward pass."""


def embed(parts: Parts, tokens: Tokens, model: ModelConfig) -> Iterator[np.ndarray]:
    """Unit vectors [at most ROWS, d] of the texts, in their order."""
    texts = len(tokens.offsets) - 1
    for at in range(0, texts, ROWS):
        items = np.arange(at, min(at + ROWS, texts))[:, None]
        ids, lengths = assemble(tokens, items, model.max_tokens)
        yield encode_texts(parts, Rows(lengths, model.pad_multiple), ids, tokens.pad).numpy()
