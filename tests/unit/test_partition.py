"""Who belongs to which client."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from fellray.platform.data_config import ByAttribute, DirichletPartition, KMeansPartition, PerUser
from fellray.platform.errors import FellrayError
from fellray.platform.partition import partition, user_embeddings

SMALL = KMeansPartition(num_clients=3, dim=8, epochs=30)


def planted() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three groups of 30, 20 and 10 users, each with its own 15 items (user ids 100, 101, ...)."""
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], [30, 20, 10])
    user = np.repeat(np.arange(60), 10)
    item = np.concatenate([15 * g + rng.permutation(15)[:10] for g in group])
    return user + 100, item, np.zeros(len(user), np.uint8)


def test_kmeans_finds_planted_groups_and_names_the_largest_first() -> None:
    user, item, splits = planted()
    clients = partition(SMALL, user, item, splits, seed=0)
    assert list(clients) == ["c0", "c1", "c2"]
    assert clients["c0"].tolist() == list(range(100, 130))
    assert clients["c1"].tolist() == list(range(130, 150))
    assert clients["c2"].tolist() == list(range(150, 160))


def test_only_training_rows_are_looked_at() -> None:
    user, item, splits = planted()
    splits[9::10] = 2
    other = np.where(splits == 2, 44 - item, item)
    first, second = (partition(SMALL, user, i, splits, seed=0) for i in (item, other))
    assert {k: v.tolist() for k, v in first.items()} == {k: v.tolist() for k, v in second.items()}
    splits[:10] = 1
    users = np.concatenate(list(partition(SMALL, user, item, splits, seed=0).values()))
    assert sorted(users) == list(range(101, 160))


def test_names_have_one_width_so_that_they_sort() -> None:
    user, item, splits = planted()
    config = KMeansPartition(num_clients=12, dim=4, epochs=2)
    clients = partition(config, user, item, splits, seed=0)
    assert list(clients) == sorted(clients) == [f"c{c:02d}" for c in range(12)]
    sizes = [len(users) for users in clients.values()]
    assert sizes == sorted(sizes, reverse=True)
    per_user = partition(PerUser(), user - 95, item, splits, seed=0)
    assert list(per_user)[:6] == ["u05", "u06", "u07", "u08", "u09", "u10"]
    assert per_user["u10"].tolist() == [10]


def test_too_many_clients_are_refused() -> None:
    user, item, splits = planted()
    with pytest.raises(FellrayError, match="num_clients=61, but only 60 users"):
        partition(KMeansPartition(num_clients=61), user, item, splits, seed=0)


def test_users_that_cannot_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    user, item, splits = planted()
    same = np.ones((60, 4), np.float32)
    monkeypatch.setattr("fellray.platform.partition.user_embeddings", lambda *_: same)
    with pytest.raises(FellrayError, match=r"num_clients=3.*60 users form only 1 different groups"):
        partition(SMALL, user, item, splits, seed=0)


def test_embeddings_repeat_bit_for_bit_and_follow_the_seed() -> None:
    user, item, _ = planted()
    runs = [user_embeddings(user - 100, item, 60, 45, 8, 3, seed) for seed in (1, 1, 2)]
    assert runs[0].dtype == np.float32
    assert runs[0].shape == (60, 8)
    assert runs[0].tobytes() == runs[1].tobytes() != runs[2].tobytes()


def test_embeddings_do_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    user_embeddings(np.array([0, 1]), np.array([0, 1]), 2, 2, 4, 2, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_by_attribute_names_clients_by_their_value() -> None:
    user, item, splits = planted()
    splits[user == 100] = 1  # no training row: in no client
    people = pa.table({"user_id": range(100, 160), "sex": ["F"] * 40 + ["M"] * 15 + [None] * 5})
    config = ByAttribute(attribute="sex", min_users=5)
    clients = partition(config, user, item, splits, 0, people)
    assert {name: (len(u), u[0], u[-1]) for name, u in clients.items()} == {
        "sex-F": (39, 101, 139),
        "sex-M": (15, 140, 154),
        "sex-other": (5, 155, 159),
    }
    assert list(clients) == sorted(clients)
    with pytest.raises(FellrayError, match=r"attribute=age: .*no such attribute; known: sex"):
        partition(ByAttribute(attribute="age"), user, item, splits, 0, people)
    with pytest.raises(FellrayError, match=r"attribute=sex: the source says nothing.*data\.users="):
        partition(config, user, item, splits, 0)


def test_dirichlet_looks_at_training_rows_only() -> None:
    user, item, splits = planted()
    splits[9::10] = 2
    items = pa.table({"item_id": range(45), "categories": ["A"] * 15 + ["B"] * 15 + ["C"] * 15})
    config = DirichletPartition(num_clients=4, alpha=1e-3)
    dealt = partition(config, user, item, splits, 0, catalogue=items)
    assert list(dealt) == ["c0", "c1", "c2", "c3"]
    assert [len(users) for users in dealt.values()] == [15] * 4
    assert sorted(np.concatenate(list(dealt.values()))) == list(range(100, 160))
    c0 = dealt["c0"]
    assert any(((low <= c0) & (c0 < high)).all() for low, high in [(100, 130), (130, 150)])
    other = np.where(splits == 2, 44 - item, item)
    again = partition(config, user, other, splits, 0, catalogue=items)
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in dealt.items()}
