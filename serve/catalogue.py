"""The catalogue that grows: a run's items, and those that came after its training.

An operator adds items; each is embedded from its title once, by the encoder that made the others'
vectors, and written to the folder of the run that began the line, so that they stay when a run is
continued. Every replica reads what is new there, so it is
recommendable everywhere `poll_s` later. Indices are never given anew and nothing is taken back.
It must not know HTTP, clients or rounds.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from fellray.platform.additions import (
    LOCK,
    Batch,
    list_batches,
    read_batches,
    write_batch,
)
from fellray.platform.encoder import load_backbone
from fellray.platform.errors import FellrayError
from fellray.platform.item_vectors import embed
from fellray.platform.model_config import ModelConfig
from fellray.platform.split import Parts, cut_model
from fellray.platform.storage import Storage
from fellray.serve.items import Items
from fellray.serve.listings import NewItem
from fellray.serve.refusal import Refusal

MOST_LATER = 10_000
"""Items that may come after the training."""
LOCK_S = 5.0
"""Seconds that one replica waits for another that is adding."""
_log = logging.getLogger("fellray.serve")


class Catalogue:
    """The items that can be recommended now."""

    def __init__(
        self,
        storage: Storage,
        items: Items,
        model: ModelConfig,
        encoder: str,
        threads: int,
        poll_s: float,
    ):
        """Args: storage: its `items/` has them. encoder: sha256 of what made the items' vectors.

        Raises:
            FellrayError: what was added before cannot be read.
        """
        self.items = items
        """Replaced whole; an index that was taken from an older one means the same."""
        self._storage = storage
        self._model = model
        self._encoder = encoder
        self._threads = threads
        self._poll_s = poll_s
        self._read: set[str] = set()
        self._looking = threading.Lock()
        self._parts: Parts | None = None
        # thread counts belong to a thread: one of its own
        self._adding = ThreadPoolExecutor(1, "items", self._begin)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="catalogue", daemon=True)
        self._take()

    def start(self) -> None:
        """Look again every `poll_s` seconds, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """End the threads."""
        self._ended.set()
        self._adding.shutdown()
        if self._thread.ident is not None:
            self._thread.join()

    def add(self, new: Sequence[NewItem]) -> "Future[int]":
        """Add items, all or none; how many were not there yet. They are on storage then.

        Raises (in the future):
            Refusal: an id has another title or other categories already, or there is no room.
            FellrayError: storage or encoder cannot be read or written.
        """
        return self._adding.submit(self._add, new)

    def look(self) -> None:
        """Read what is new on storage; what cannot be read is tried again the next time."""
        try:
            self._take()
        except FellrayError as error:
            _log.warning("items that are new stay out: %s", error)

    def _begin(self) -> None:
        torch.set_num_threads(self._threads)

    def _work(self) -> None:
        while not self._ended.wait(self._poll_s):
            self.look()

    def _take(self) -> None:
        with self._looking:
            dim = self.items.vectors_Td.shape[1]
            names = [name for name in list_batches(self._storage) if name not in self._read]
            if names:
                found = read_batches(self._storage, names, self._encoder, dim)
                self.items = self.items.extend(found)
                self._read.update(names)

    def _add(self, new: Sequence[NewItem]) -> int:
        self._take()
        self._sift(new)  # refuse before the encoder is asked
        vectors = self._embed([one.title for one in new])
        with self._storage.lock(LOCK, LOCK_S) as still_held:
            self._take()
            fresh = self._sift(new)
            if fresh:
                ids = np.array([new[at].item_id for at in fresh], np.int64)
                titles = [new[at].title for at in fresh]
                categories = [tuple(sorted(set(new[at].categories))) for at in fresh]
                still_held()
                batch = Batch(ids, titles, categories, vectors[fresh])
                write_batch(self._storage, batch, self._encoder)
        self._take()
        return len(fresh)

    def _sift(self, new: Sequence[NewItem]) -> list[int]:
        """Places of those that are not there yet."""
        items = self.items
        fresh: dict[int, int] = {}
        for place, one in enumerate(new):
            at = items.index(one.item_id)
            if at is None:
                other = new[fresh.setdefault(one.item_id, place)]
                held = other.title, set(other.categories)
            else:
                held = items.titles[at], set(items.categories[at])
            if held != (one.title, set(one.categories)):
                message = f"item {one.item_id} is there with another title or other categories"
                raise Refusal(409, "item_exists", message, f"items.{place}.item_id")
        if len(items) - items.trained + len(fresh) > MOST_LATER:
            message = f"at most {MOST_LATER} items may come after the training; train again"
            raise Refusal(409, "catalogue_full", message, "items")
        return list(fresh.values())

    def _embed(self, titles: Sequence[str]) -> torch.Tensor:
        if self._parts is None:
            backbone = load_backbone(self._model.name)
            if backbone.sha256 != self._encoder:
                raise FellrayError(f"model.name {self._model.name}: has other weights by now")
            self._parts = cut_model(backbone, self._model)
        tokens = self.items.tokenize(titles)
        return torch.from_numpy(np.concatenate(list(embed(self._parts, tokens, self._model))))
