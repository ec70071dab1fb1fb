"""The items of a run: ids, titles, categories, vectors, and how a history of them is read.

It must not know clients or rounds. Shapes: I items, d width, H entries of a history, L tokens.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fellray.platform.config import ModelConfig
from fellray.platform.encoder import Tokens, tokenize
from fellray.platform.reader import assemble
from fellray.platform.shards import Dataset
from fellray.serve.refusal import Refusal


@dataclass(frozen=True)
class Reading:
    """A history as the model reads it, and what of the catalogue was met in it."""

    ids_L: Tensor
    """Token ids between the special tokens, int64."""
    met: np.ndarray
    """Indices of items, int64; a title that several items share means all of them."""


class Items:
    """The catalogue of a run, with its tokenizer."""

    def __init__(self, data: Dataset, tokenizer: Any, model: ModelConfig):
        self.ids = data.item_ids
        """int64 [I], ascending"""
        self.titles = data.titles
        self.categories = [frozenset(filter(None, line.split("|"))) for line in data.categories]
        """Of each item; empty where it has none."""
        self.popularity = data.popularity
        """int64 [I]: how often each was met in all clients' training splits."""
        self.vectors_Id = data.vectors
        self.tokens = tokenize(tokenizer, data.titles, model.max_tokens)
        self._tokenizer = tokenizer
        self._one_at_a_time = threading.Lock()
        self._model = model
        self._of_title: dict[str, list[int]] = {}
        for item, title in enumerate(data.titles):
            self._of_title.setdefault(_fold(title), []).append(item)
        self._of_category: dict[str, list[int]] = {}
        for item, names in enumerate(self.categories):
            for name in names:
                self._of_category.setdefault(name, []).append(item)

    def __len__(self) -> int:
        return len(self.titles)

    def find(
        self, item_ids: Sequence[int], field: str, places: Sequence[int] | None = None
    ) -> np.ndarray:
        """Indices of items by their ids.

        Args:
            field: where the ids stand in the request.
            places: of each id in that field; by default one after the other.

        Raises:
            Refusal: one is not there.
        """
        wanted = np.asarray(item_ids, np.int64)
        at = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        if (unknown := np.flatnonzero(self.ids[at] != wanted)).size:
            first = int(unknown[0])
            place = f"{field}.{places[first] if places else first}"
            raise Refusal(404, "unknown_item", f"no item has the id {wanted[first]}", place)
        return at

    def in_categories(self, names: Sequence[str], field: str) -> np.ndarray:
        """Indices, ascending, of items in any of these categories.

        Raises:
            Refusal: no item is in one of them.
        """
        for place, name in enumerate(names):
            if name not in self._of_category:
                has = (
                    "these items have no such category"
                    if self._of_category
                    else ("the items of this run have no categories")
                )
                raise Refusal(404, "unknown_category", has, f"{field}.{place}")
        return np.unique(np.concatenate([self._of_category[name] for name in names]))

    def knows(self, title: str) -> bool:
        """Whether an item has the title, up to case and surrounding space."""
        return _fold(title) in self._of_title

    def split_history(self, text: str) -> list[str]:
        """The titles in `title; title`; a title of the catalogue may hold a semicolon itself."""
        parts = [part for part in text.split(";") if part.strip()]
        titles: list[str] = []
        while parts:
            lengths = range(len(parts), 1, -1)
            known = (n for n in lengths if self.knows(";".join(parts[:n])))
            taken = next(known, 1)
            titles.append(";".join(parts[:taken]).strip())
            parts = parts[taken:]
        return titles

    def read(self, history: Sequence[int | str], field: str = "history") -> Reading:
        """A history of item ids and titles, oldest first, at least one.

        Titles need not be in the catalogue; the newest `model.max_history` entries are read.

        Raises:
            Refusal: an id is not there.
        """
        places = [place for place, entry in enumerate(history) if isinstance(entry, int)]
        ids = [entry for entry in history if isinstance(entry, int)]
        found = self.find(ids, field, places)
        item_at = dict(zip(places, found.tolist(), strict=True))
        met = set(item_at.values())
        for entry in history:
            if isinstance(entry, str):
                met.update(self._of_title.get(_fold(entry), ()))
        newest = range(max(0, len(history) - self._model.max_history), len(history))
        texts = [entry.strip() for at in newest if isinstance(entry := history[at], str)]
        own = iter(self._tokenize(texts))
        pieces = [self._piece(item_at[at]) if at in item_at else next(own) for at in newest]
        return Reading(self._join(pieces), np.array(sorted(met), np.int64))

    def read_items(self, items: np.ndarray) -> Reading:
        """A history of indices of items, oldest first, at least one."""
        pieces = [self._piece(item) for item in items[-self._model.max_history :].tolist()]
        return Reading(self._join(pieces), np.unique(items.astype(np.int64)))

    def _piece(self, item: int) -> np.ndarray:
        return self.tokens.ids[self.tokens.offsets[item] : self.tokens.offsets[item + 1]]

    def _tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        with self._one_at_a_time:  # tokenizers refuse two threads
            tokens = tokenize(self._tokenizer, texts, self._model.max_tokens)
        return np.split(tokens.ids, tokens.offsets[1:-1])

    def _join(self, pieces: Sequence[np.ndarray]) -> Tensor:
        offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        known = self.tokens
        own = Tokens(np.concatenate(pieces), offsets, known.prefix, known.suffix, known.pad)
        ids_L, _ = assemble(own, np.arange(len(pieces))[None], self._model.max_tokens)
        return ids_L


def _fold(title: str) -> str:
    """What two titles that count as the same have in common."""
    return title.strip().casefold()
