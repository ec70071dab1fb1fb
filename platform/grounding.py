"""Grounding: from a title that a model wrote to the items there are.

All titles, written or real, become the last hidden state at their last token, of the model without
adapters; items are ranked by the L2 distance to what was written (BIGRec, Bao et al., 2023). Who
writes is not known here.

Several items may have one title: they have one embedding, so one distance to the bit, and follow
each other by their index. A held-out item counts at the best place among the items of its title
that are still candidates; places before it are counted item by item.

Shapes: N answers, I items, T different titles, d width.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fellray.platform.errors import FellrayError
from fellray.platform.rows import Rows
from fellray.platform.script import pack_ids
from fellray.platform.split import Parts
from fellray.platform.tower import Tower, run_trunk

ROWS = 64
"""Titles in one forward pass."""


class Grounding:
    """The embeddings of a catalogue's titles, one for each different title."""

    def __init__(self, titles: Sequence[str], vectors_Id: Tensor):
        """Args: vectors_Id: on the device where answers will be."""
        place: dict[str, int] = {}
        title_I = [place.setdefault(title, len(place)) for title in titles]
        first_T = torch.from_numpy(np.unique(title_I, return_index=True)[1]).to(vectors_Id.device)
        self._vectors_Td = vectors_Id[first_T]
        self._title_I = torch.tensor(title_I, device=vectors_Id.device)
        alike: dict[int, list[int]] = {}
        for item, title in enumerate(title_I):
            alike.setdefault(title, []).append(item)
        self._alike = {i: items for items in alike.values() if len(items) > 1 for i in items}
        """Items that share their title with others -> all of it, ascending."""

    def score(self, answer_Nd: Tensor) -> Tensor:
        """Minus the distances to all items [N, I]."""
        mode = "donot_use_mm_for_euclid_dist"  # exact, and a row's bits are its own
        distance_NT = torch.cdist(answer_Nd, self._vectors_Td, compute_mode=mode)
        return -distance_NT[:, self._title_I]

    def aim(self, truth: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """What a ranking is to hit for a user's true items: for each the first candidate of its
        title that is not taken by another one."""
        wanted = set(truth.tolist())
        if not wanted & self._alike.keys():
            return truth
        hidden = set(seen.tolist()) - wanted
        taken: set[int] = set()
        for item in sorted(wanted):
            alike = self._alike.get(item, [item])
            taken.add(next(i for i in alike if i not in hidden and i not in taken))
        return np.array(sorted(taken), dtype=truth.dtype)


def embed_titles(
    parts: Parts, ids: Sequence[Sequence[int]], multiple: int, pad: int
) -> Iterator[np.ndarray]:
    """Embeddings [at most ROWS, d] of titles, in their order, where the whole model is at hand.

    Args:
        ids: token ids of every title, as `Script.titles` has them.

    Raises:
        FellrayError: a title has no token.
    """
    if empty := [row for row, title in enumerate(ids) if not title]:
        raise FellrayError(
            f"item {empty[0]} (in the order of items.parquet): the model's tokenizer makes nothing "
            "of its title; give it another one, or leave the item out"
        )
    tower = Tower(parts.bottom, parts.top, pad, None)
    for at in range(0, len(ids), ROWS):
        ids_L, lengths_N = pack_ids(ids[at : at + ROWS])
        rows = Rows(lengths_N, multiple)
        with torch.no_grad():
            h_Ld, used = tower.rise(rows, ids_L, torch.zeros_like(lengths_N), False)
            states_Ld = tower.read(rows, run_trunk(parts.trunk, rows, h_Ld), used)
        yield states_Ld[lengths_N.cumsum(0) - 1].numpy()
