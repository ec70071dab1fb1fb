"""Item-kNN and BPR-MF by the library `implicit`, an optional dependency: rows for orientation.

It must not know how they are tuned or evaluated. Letters: I items, U users, B users of a batch, K
factors.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fellray.platform.errors import FellrayError
from fellray.platform.union import Scorer, Union, mark

STAGES = 10
"""How often BPR-MF is looked at while it trains."""


def require_library() -> None:
    """Refuse early where `implicit` is not installed.

    Raises:
        FellrayError: it is not.
    """
    if find_spec("implicit") is None:
        raise FellrayError(
            "the rows for orientation need the package implicit, which is not installed: "
            "pip install -c constraints.txt 'fellray[baselines]', or leave them out"
        )


def fit_item_knn(union: Union, settings: Mapping[str, Any], seed: int) -> Iterator[Scorer]:
    """Item-based nearest neighbours (Deshpande and Karypis 2004, doi 10.1145/963770.963776).

    An item's score is the sum of its cosines with the items of a history that have it among their
    neighbours; items are vectors over users. No draw is made: every seed gives the same.

    Args:
        settings: `neighbours`, how many an item has.
    """
    require_library()
    from implicit.nearest_neighbours import CosineRecommender
    from implicit.utils import ParameterWarning

    del seed
    # an item is its own nearest neighbour, which says nothing
    model = CosineRecommender(K=settings["neighbours"] + 1, num_threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParameterWarning)  # of a format it makes itself
        model.fit(union.matrix(), show_progress=False)
    similar_II = model.similarity.tolil()
    similar_II.setdiag(0)
    similar_II = similar_II.tocsr()

    def score(places_B: np.ndarray, histories: Sequence[np.ndarray]) -> Tensor:
        del places_B
        return torch.from_numpy((mark(histories, union.num_items) @ similar_II).toarray())

    yield score


def fit_bpr_mf(union: Union, settings: Mapping[str, Any], seed: int) -> Iterator[Scorer]:
    """Matrix factors under BPR (Rendle et al. 2009, arXiv 1205.2618), item biases among them.

    A user is what was learned of it: what it met after the training split is not read.

    Args:
        settings: `factors`, `learning_rate`, `regularization`, `epochs`.

    Yields:
        A scorer after each tenth of the epochs.
    """
    require_library()
    from implicit.cpu.bpr import BayesianPersonalizedRanking

    draw = np.random.Generator(np.random.Philox(seed))
    model = BayesianPersonalizedRanking(
        factors=settings["factors"],
        learning_rate=settings["learning_rate"],
        regularization=settings["regularization"],
        iterations=-(-settings["epochs"] // STAGES),
        num_threads=1,  # more would write over each other, in any order
        random_state=draw,
    )
    matrix_UI = union.matrix()
    for _ in range(STAGES):
        model.fit(matrix_UI, show_progress=False)  # goes on where it was
        yield _multiply(model.user_factors.copy(), model.item_factors.copy())


def _multiply(users_UK: np.ndarray, items_IK: np.ndarray) -> Scorer:
    def score(places_B: np.ndarray, histories: Sequence[np.ndarray]) -> Tensor:
        del histories
        return torch.from_numpy(users_UK[places_B] @ items_IK.T)

    return score
