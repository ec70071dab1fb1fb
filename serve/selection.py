"""Which items a query lets through: its candidates and filters as a choice among indices.

It must not know scores, nor who asks.
"""

from collections.abc import Sequence

import numpy as np

from fellray.serve.items import Items
from fellray.serve.ranking import Choice
from fellray.serve.schema import Filters


def choose(
    items: Items,
    k: int,
    filters: Filters,
    candidates: Sequence[int] | None,
    seen: np.ndarray,
) -> Choice:
    """Items that pass all filters, the best k of them.

    Args:
        seen: indices of what the user met.

    Raises:
        Refusal: an id or a category is not there.
    """
    only = [
        np.unique(items.find(ids, name))
        for name, ids in (("candidates", candidates), ("filters.allow", filters.allow))
        if ids is not None
    ]
    if filters.categories is not None:
        only.append(items.in_categories(filters.categories, "filters.categories"))
    without = [seen] if filters.seen else []
    if filters.deny is not None:
        without.append(items.find(filters.deny, "filters.deny"))
    kept = only[0] if only else None
    for more in only[1:]:
        assert kept is not None
        kept = np.intersect1d(kept, more)
    return Choice(min(k, len(items)), kept, np.concatenate(without) if without else None)
