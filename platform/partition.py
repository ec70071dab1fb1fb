"""The partition: which users belong to which client.

It sees the training split only and must not know models, methods or where clients run.
Letters: U users, I items, D width of the embeddings, N training rows, B rows of a batch.
"""

import warnings

import numpy as np
import pyarrow as pa
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from fellray.platform.data_config import (
    AnyPartition,
    ByAttribute,
    DirichletPartition,
    KMeansPartition,
    PerUser,
)
from fellray.platform.errors import FellrayError
from fellray.platform.groups import group_users, name_clients
from fellray.platform.label_skew import deal_users, label_users
from fellray.platform.threads import one_thread
from fellray.platform.user_attributes import of_users

_LEARNING_RATE = 0.01
_REGULARISATION = 0.01
_STEPS_PER_EPOCH = 100
_SMALLEST_BATCH = 1024


def partition(
    config: AnyPartition,
    user_id: np.ndarray,
    item_id: np.ndarray,
    splits: np.ndarray,
    seed: int,
    described: pa.Table | None = None,
    catalogue: pa.Table | None = None,
) -> dict[str, np.ndarray]:
    """Client id -> its users' ids (int64, ascending), the clients sorted by id.

    kmeans: KMeans on the users' BPR embeddings, as FELLRec (section 4.3) deals users out; `c0` is
    the largest client, equal sizes by smallest user id. per_user: `u<user_id>`. by_attribute:
    `<attribute>-<value>`, see `groups`. dirichlet: `c0` drew first, see `label_skew`. Numbers are
    padded with zeros to one width. Users without a training row belong to no client.

    Args:
        user_id, item_id: int64 [N], all interactions.
        splits: uint8 [N], 0 for training.
        described: the users' attributes, as `Interactions.users`; by_attribute reads them.
        catalogue: the items, as `Interactions.items`; dirichlet reads their categories.

    Raises:
        FellrayError: there are not enough users, or not enough different ones, for the clients; or
            the source lacks what the partition goes by.
    """
    training = splits == 0
    users, user = np.unique(user_id[training], return_inverse=True)
    match config:
        case PerUser():
            width = len(str(users.max(initial=0)))
            return {f"u{u:0{width}d}": users[i : i + 1] for i, u in enumerate(users.tolist())}
        case ByAttribute():
            return _by_attribute(config, users, described)
        case DirichletPartition():
            assert catalogue is not None, "dirichlet needs the items"
            item = np.searchsorted(catalogue["item_id"].to_numpy(), item_id[training])
            label_U = label_users(user, item, catalogue["categories"])
            dealt = deal_users(label_U, config.num_clients, config.alpha, config.min_users, seed)
            return _number([users[places] for places in dealt])
        case KMeansPartition():
            return _number(_cluster(config, users, user, item_id[training], seed))


def _by_attribute(
    config: ByAttribute, users: np.ndarray, described: pa.Table | None
) -> dict[str, np.ndarray]:
    if described is None:
        raise FellrayError(
            f"data.partition.attribute={config.attribute}: the source says nothing of its users; a "
            "file of them can be named with data.users=<file> (tables), or lies beside the others "
            "(users.parquet, ml-1m's users.dat, RecBole's .user)"
        )
    group_U = group_users(of_users(described, users), config.attribute, config.min_users)
    groups = sorted(set(group_U.tolist()))
    names = name_clients(config.attribute, groups)
    clients = {n: users[group_U == group] for n, group in zip(names, groups, strict=True)}
    return dict(sorted(clients.items()))


def _number(groups: list[np.ndarray]) -> dict[str, np.ndarray]:
    width = len(str(len(groups) - 1))
    return {f"c{c:0{width}d}": group for c, group in enumerate(groups)}


def _cluster(
    config: KMeansPartition, users: np.ndarray, user: np.ndarray, item_id: np.ndarray, seed: int
) -> list[np.ndarray]:
    """The users of each cluster, the largest first."""
    if len(users) < config.num_clients:
        raise FellrayError(
            f"data.partition.num_clients={config.num_clients}, but only {len(users)} users have "
            "training interactions: some clients would be empty; lower num_clients"
        )
    items, item = np.unique(item_id, return_inverse=True)
    with one_thread():
        embeddings_UD = user_embeddings(
            user, item, len(users), len(items), config.dim, config.epochs, seed
        )
    kmeans = KMeans(config.num_clients, n_init=10, random_state=seed)
    with warnings.catch_warnings(), threadpool_limits(1):
        # scikit-learn warns that clusters came out empty; below that is an error.
        warnings.simplefilter("ignore", ConvergenceWarning)
        label_U = kmeans.fit_predict(embeddings_UD)
    groups = [users[label_U == label] for label in np.unique(label_U)]
    if len(groups) < config.num_clients:
        raise FellrayError(
            f"data.partition.num_clients={config.num_clients}, but the {len(users)} users form "
            f"only {len(groups)} different groups: some clients would be empty; lower num_clients"
        )
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def user_embeddings(
    user: np.ndarray,
    item: np.ndarray,
    num_users: int,
    num_items: int,
    dim: int,
    epochs: int,
    seed: int,
) -> np.ndarray:
    """float32 [U, D]: matrix factorisation by Bayesian personalised ranking.

    Rendle et al., BPR (UAI 2009), equation BPR-Opt: -log sigmoid(x_ui - x_uj) plus L2 on the
    vectors met, for one item j drawn evenly per row. Adam on mini-batches instead of the paper's
    plain SGD. A pair whose j the user has met is left out, so the rest is drawn from the unmet.

    Args:
        user: int [N] in 0..U-1, one entry per training interaction.
        item: int [N] in 0..I-1.
    """
    generator = torch.Generator().manual_seed(seed)
    user_N, item_N = torch.from_numpy(user).long(), torch.from_numpy(item).long()
    met = torch.unique(user_N * num_items + item_N)
    users_UD = (0.1 * torch.randn(num_users, dim, generator=generator)).requires_grad_()
    items_ID = (0.1 * torch.randn(num_items, dim, generator=generator)).requires_grad_()
    optimizer: torch.optim.Optimizer = torch.optim.SparseAdam(
        [users_UD, items_ID], lr=_LEARNING_RATE
    )
    batch_size = max(_SMALLEST_BATCH, len(user_N) // _STEPS_PER_EPOCH)
    for _ in range(epochs):
        order_N = torch.randperm(len(user_N), generator=generator)
        for start in range(0, len(user_N), batch_size):
            rows_B = order_N[start : start + batch_size]
            u_B, i_B = user_N[rows_B], item_N[rows_B]
            j_B = torch.randint(num_items, (len(rows_B),), generator=generator)
            key_B = u_B * num_items + j_B
            place_B = torch.searchsorted(met, key_B).clamp(max=len(met) - 1)
            unmet_B = met[place_B] != key_B
            u_BD = F.embedding(u_B, users_UD, sparse=True)
            i_BD, j_BD = F.embedding(torch.stack([i_B, j_B]), items_ID, sparse=True)
            margin_B = (u_BD * (i_BD - j_BD)).sum(dim=1)
            penalty_B = (u_BD.square() + i_BD.square() + j_BD.square()).sum(dim=1)
            loss_B = _REGULARISATION * penalty_B - F.logsigmoid(margin_B)
            optimizer.zero_grad()
            (loss_B * unmet_B).sum().div(len(rows_B)).backward()
            optimizer.step()
    return users_UD.detach().numpy()
