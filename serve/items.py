"""The items of a run: ids, titles, categories, vectors, and how a history of them is read.

Items that came after the training stand behind those that were there before, so an index once given
stays. It must not know clients or rounds.

Shapes: T items that were there in training, J later ones, I = T + J, d width, L tokens.
"""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fellray.platform.additions import Batch
from fellray.platform.encoder import Tokens, tokenize
from fellray.platform.model_config import ModelConfig
from fellray.platform.reader import assemble
from fellray.platform.shards import Dataset
from fellray.serve.refusal import Refusal
from fellray.serve.schema import Item


@dataclass(frozen=True)
class Reading:
    """A history as the model reads it, and what of the catalogue was met in it."""

    ids_L: Tensor
    """Token ids between the special tokens, int64."""
    met: np.ndarray
    """Indices of items, int64; a title that several items share means all of them."""


class Items:
    """The catalogue of a run, with its tokenizer. It does not change: `extend` makes another."""

    def __init__(self, data: Dataset, tokenizer: Any, model: ModelConfig):
        self.trained = len(data.titles)
        """T"""
        self.ids = data.item_ids
        """int64 [I]"""
        self._source_ids = data.source_ids
        self.titles = data.titles
        self.categories = [frozenset(filter(None, line.split("|"))) for line in data.categories]
        """Of each item; empty where it has none."""
        self.popularity = data.popularity
        """int64 [I]: how often each was met in all clients' training splits."""
        self.vectors_Td = data.vectors
        self.later_Jd = data.vectors[:0]
        """Vectors of later items: products with those of the others stay as they were."""
        self.tokens = tokenize(tokenizer, data.titles, model.max_tokens)
        self._tokenizer = tokenizer
        self._one_at_a_time = threading.Lock()
        self._model = model
        self._order = np.arange(self.trained)
        """Indices in the order of ids."""
        self._of_title: dict[str, list[int]] = {}
        self._of_category: dict[str, list[int]] = {}
        self._folded: list[str] = []
        """For `search`: each word has a space in front."""
        self._enter(0)

    def __len__(self) -> int:
        return len(self.titles)

    def extend(self, batch: Batch) -> "Items":
        """With these items behind the others; those whose id is there already are left out."""
        _, first = np.unique(batch.ids, return_index=True)
        new = np.sort(first[~np.isin(batch.ids[first], self.ids)])
        titles = [batch.titles[at] for at in new]
        more = copy.copy(self)
        more.ids = np.concatenate([self.ids, batch.ids[new]])
        more.titles = self.titles + titles
        more.categories = self.categories + [frozenset(batch.categories[at]) for at in new]
        more.popularity = np.concatenate([self.popularity, np.zeros(len(new), np.int64)])
        more.later_Jd = torch.cat([self.later_Jd, batch.vectors[torch.from_numpy(new)]])
        known, own = self.tokens, self.tokenize(titles)
        offsets = np.concatenate([known.offsets, known.offsets[-1] + own.offsets[1:]])
        ids = np.concatenate([known.ids, own.ids])
        more.tokens = Tokens(ids, offsets, known.prefix, known.suffix, known.pad)
        more._order = np.argsort(more.ids, kind="stable")
        more._of_title = {title: list(items) for title, items in self._of_title.items()}
        more._of_category = {name: list(items) for name, items in self._of_category.items()}
        more._folded = list(self._folded)
        more._enter(len(self))
        return more

    def _enter(self, first: int) -> None:
        for item in range(first, len(self)):
            title = _fold(self.titles[item])
            self._folded.append(f" {title}")
            self._of_title.setdefault(title, []).append(item)
            for name in self.categories[item]:
                self._of_category.setdefault(name, []).append(item)

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
        at = self.locate(item_ids)
        if (unknown := np.flatnonzero(at < 0)).size:
            first = int(unknown[0])
            place = f"{field}.{places[first] if places else first}"
            raise Refusal(404, "unknown_item", f"no item has the id {item_ids[first]}", place)
        return at

    def locate(self, item_ids: Sequence[int]) -> np.ndarray:
        """Indices of items by their ids, int64; -1: there is none with this id."""
        wanted = np.asarray(item_ids, np.int64)
        place = np.searchsorted(self.ids, wanted, sorter=self._order).clip(max=len(self.ids) - 1)
        at = self._order[place]
        return np.where(self.ids[at] == wanted, at, -1)

    def index(self, item_id: int) -> int | None:
        """The index of an item; None: there is none with this id."""
        at = int(self.locate([item_id])[0])
        return at if at >= 0 else None

    def describe(self, at: int) -> Item:
        """What is known of the item at this index."""
        return Item(
            item_id=int(self.ids[at]),
            title=self.titles[at],
            categories=sorted(self.categories[at]),
            popularity=int(self.popularity[at]),
            source_id=self.source_id(at),
        )

    def source_id(self, at: int) -> str | None:
        """What the source calls the item at this index; None: as its id, or it came later."""
        return self._source_ids[at] if self._source_ids and at < self.trained else None

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

    def search(self, words: str, most: int) -> list[int]:
        """Indices of items whose title, or a word of it, begins so; whole titles first.

        Among equals what was met more often comes first.
        """
        asked = f" {_fold(words)}"
        found = [item for item, title in enumerate(self._folded) if asked in title]
        first = {item: not self._folded[item].startswith(asked) for item in found}
        found.sort(key=lambda item: (first[item], -self.popularity[item], self.ids[item]))
        return found[:most]

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
        tokens = self.tokenize(texts) if texts else None
        own = iter(np.split(tokens.ids, tokens.offsets[1:-1]) if tokens else ())
        pieces = [self._piece(item_at[at]) if at in item_at else next(own) for at in newest]
        return Reading(self._join(pieces), np.array(sorted(met), np.int64))

    def read_items(self, items: np.ndarray) -> Reading:
        """A history of indices of items, oldest first, at least one."""
        pieces = [self._piece(item) for item in items[-self._model.max_history :].tolist()]
        return Reading(self._join(pieces), np.unique(items.astype(np.int64)))

    def _piece(self, item: int) -> np.ndarray:
        return self.tokens.ids[self.tokens.offsets[item] : self.tokens.offsets[item + 1]]

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of any titles."""
        with self._one_at_a_time:  # tokenizers refuse two threads
            return tokenize(self._tokenizer, texts, self._model.max_tokens)

    def _join(self, pieces: Sequence[np.ndarray]) -> Tensor:
        offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        known = self.tokens
        own = Tokens(np.concatenate(pieces), offsets, known.prefix, known.suffix, known.pad)
        ids_L, _ = assemble(own, np.arange(len(pieces))[None], self._model.max_tokens)
        return ids_L


def _fold(title: str) -> str:
    """What two titles that count as the same have in common."""
    return title.strip().casefold()
