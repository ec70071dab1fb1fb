"""Label skew: clients of equal size whose users differ in the category they met most.

The draw is that of Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification" (arXiv 1909.06335, 2019), section 3: client c has a mix of labels
q_c ~ Dirichlet(alpha * p), p the mix of all data, and takes as many examples as every other client,
each label with the chance that q_c gives it. They deal out examples, each of one class. A user's
history must stay together, so here users are dealt out, and a user's label is the category that
they met most in training. It must not know models or how a source is read.

Letters: U users, I items, K categories, C clients, N training rows.
"""

from itertools import pairwise

import numpy as np
import pyarrow as pa

from fellray.platform.errors import FellrayError

_EVERYWHERE = 0.9
"""A category of this share of the items tells nobody apart: Amazon's first one is the shelf."""
_CELLS = 1 << 18
"""Sums of users times categories that are held at a time."""


def label_users(user: np.ndarray, item: np.ndarray, categories: pa.ChunkedArray) -> np.ndarray:
    """int64 [U]: of each user the number of the category met most, among the names in order.

    An interaction counts 1, in equal parts for each category of its item. Categories of nine items
    out of ten are left out unless there are no others. Of equal sums the first name counts; users
    who met no category have a label of their own, the last.

    Args:
        user: int [N] in 0..U-1.
        item: int [N] in 0..I-1.
        categories: text [I], joined by `|`.

    Raises:
        FellrayError: no item has a category.
    """
    lists = [sorted(set(filter(None, line.split("|")))) for line in categories.to_pylist()]
    names = sorted({name for one in lists for name in one})
    if not names:
        raise FellrayError(
            "data.partition.kind=dirichlet needs categories of items, and this source has none; "
            "name their column with data.columns.categories=<column>, or choose another partition"
        )
    number = {name: k for k, name in enumerate(names)}
    at = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
    of = np.array([number[name] for one in lists for name in one], np.int64)
    share = np.bincount(of, minlength=len(names)) / max(1, sum(map(bool, lists)))
    telling = share < _EVERYWHERE
    if telling.any():
        at, of = at[telling[of]], of[telling[of]]
    sizes_I = np.bincount(at, minlength=len(lists))
    starts_I = np.cumsum(sizes_I) - sizes_I
    by_user = np.argsort(user, kind="stable")
    user, item = user[by_user], item[by_user]
    num_users, block = int(user.max(initial=-1)) + 1, max(1, _CELLS // len(names))
    label_U = np.empty(num_users, np.int64)
    bounds = np.searchsorted(user, np.arange(0, num_users + block, block))
    for first, (low, high) in zip(range(0, num_users, block), pairwise(bounds), strict=False):
        last = min(first + block, num_users)
        met = item[low:high]
        sizes_N = sizes_I[met]
        row = np.repeat(np.arange(len(met)), sizes_N)
        place = np.arange(len(row)) - (np.cumsum(sizes_N) - sizes_N - starts_I[met])[row]
        cell = (user[low:high][row] - first) * len(names) + of[place]
        sums = np.bincount(cell, 1 / sizes_N[row], minlength=(last - first) * len(names))
        # rounded, so that three thirds are equal to a whole
        sums_UK = sums.reshape(last - first, len(names)).round(9)
        label_U[first:last] = np.where(sums_UK.any(axis=1), sums_UK.argmax(axis=1), len(names))
    return label_U


def deal_users(
    label_U: np.ndarray, num_clients: int, alpha: float, min_users: int, seed: int
) -> list[np.ndarray]:
    """For each client the places of its users in `label_U`, ascending.

    Sizes differ by one at most. The clients draw one after another without putting back; what
    exceeds a label's users is drawn again among the labels that are left, by the client's own
    mix, or by what is left where its mix names none of them. So the last take what the others left.

    Raises:
        FellrayError: a client would have fewer than `min_users` users.
    """
    smallest = len(label_U) // num_clients
    if smallest < min_users:
        raise FellrayError(
            f"data.partition.num_clients={num_clients}: {len(label_U)} users are {smallest} for "
            f"each client, and data.partition.min_users is {min_users}; lower one of the two"
        )
    rng = np.random.default_rng(seed)
    _, label_U, left_K = np.unique(label_U, return_inverse=True, return_counts=True)
    shuffled = rng.permutation(len(label_U))
    by_label = shuffled[np.argsort(label_U[shuffled], kind="stable")]
    ends_K = np.cumsum(left_K)
    mixes_CK = rng.dirichlet(alpha * left_K / len(label_U), size=num_clients)
    dealt = []
    for c, mix_K in enumerate(mixes_CK):
        size = smallest + (c < len(label_U) % num_clients)
        taken_K = np.zeros_like(left_K)
        while missing := size - int(taken_K.sum()):
            rest_K = left_K - taken_K
            chance_K = np.where(rest_K > 0, mix_K, 0.0)
            if not chance_K.sum() > 0:
                chance_K = rest_K.astype(float)
            drawn_K = rng.multinomial(missing, chance_K / chance_K.sum())
            taken_K += np.minimum(drawn_K, rest_K)
        first_K = ends_K - left_K
        runs = zip(first_K.tolist(), taken_K.tolist(), strict=True)
        users = np.concatenate([by_label[at : at + count] for at, count in runs])
        dealt.append(np.sort(users))
        left_K = left_K - taken_K
    return dealt
