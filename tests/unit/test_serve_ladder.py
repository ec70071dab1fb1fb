"""Who answers for a client without adapters of its own, and what a mean of adapters is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.rounds import EVERYONE, Rounds
from fellray.platform.storage import Storage
from fellray.serve.blends import EVERYBODY, Blends, name_blend
from fellray.serve.ladder import Counts, Known, choose_layer, find_nearest, stack_counts


@pytest.fixture
def counts() -> Counts:
    met = {"a": [2, 1, 0, 0], "b": [4, 2, 0, 0], "c": [0, 1, 3, 0], "d": [0, 0, 0, 0]}
    return stack_counts((c, np.array(row)) for c, row in met.items())


def test_counts_are_kept_sparse(counts: Counts) -> None:
    assert counts.learners == ("a", "b", "c")
    assert counts.starts_C.tolist() == [0, 2, 4]
    assert counts.items_M.tolist() == [0, 1, 0, 1, 1, 2]
    assert counts.counts_M.tolist() == [2, 1, 4, 2, 1, 3]


def test_nearest_by_cosine_then_by_name(counts: Counts) -> None:
    everyone = {"a", "b", "c", "d"}

    def near(*row: int, most: int = 3, among: set[str] = everyone) -> tuple[str, ...]:
        return find_nearest(counts, np.array(row), among, most)

    assert near(1, 0, 0, 0) == ("a", "b")  # c shares nothing
    assert near(1, 0, 0, 0, most=1) == ("a",)  # a and b point the same way
    assert near(0, 1, 3, 0, most=1) == ("c",)
    assert near(0, 1, 3, 0, most=2) == ("a", "c")
    assert near(1, 0, 0, 0, among={"b", "c"}) == ("b",)
    assert near(0, 0, 0, 5) == ()
    assert near(0, 0, 0, 0) == ()
    nobody = stack_counts(())
    assert find_nearest(nobody, np.array([1]), everyone) == ()


@pytest.mark.parametrize(
    ("learner", "trained", "has_history", "nearest", "layer"),
    [
        ("a", {"a", "b"}, True, (), "client"),
        ("a", {"b"}, True, ("b",), "neighbours"),
        ("a", {"b"}, True, (), "mean"),
        ("a", set(), True, (), "client"),  # in the start all are one
        (None, {"b"}, True, ("b",), "neighbours"),
        (None, {"b"}, True, (), "mean"),
        (None, set(), True, (), "mean"),
        ("a", {"a"}, False, (), "popularity"),
        (None, {"a"}, False, ("a",), "popularity"),
    ],
)
def test_the_first_rung_that_holds(
    learner: str | None, trained: set[str], has_history: bool, nearest: tuple[str, ...], layer: str
) -> None:
    assert choose_layer(Known(learner, trained, has_history), nearest) == layer


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Round 0 is the start, round 1 holds a, b and c of five learners."""
    storage = Storage(tmp_path)
    rounds = Rounds(storage)
    start = rounds.stage(0, "start", [EVERYONE], {"client.values": torch.tensor([[1.0, 1.0]])})
    rounds.commit(0, [start], {})
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, -3.0]])
    rounds.commit(1, [rounds.stage(1, "some", ["a", "b", "c"], {"client.values": own})], {})
    return storage


def test_blends_are_read_like_clients(storage: Storage) -> None:
    blends = Blends(storage, ["a", "b", "c", "d", "e"])
    name = "client.values"
    assert blends.trained(1, name) == {"a", "b", "c"}
    assert blends.trained(0, name) == frozenset()
    asked = ["b", name_blend(["a", "b"]), "d", EVERYBODY]
    assert blends.load(1, asked, [name])[name].tolist() == [[3, 4], [2, 3], [1, 1], [4, 1]]
    assert blends.page_rounds(1, asked, name) == [1, 1, 0, 1]
    assert blends.load(0, [EVERYBODY], [name])[name].tolist() == [[1, 1]]
    assert blends.load(1, ["a"], [name])[name].tolist() == [[1, 2]]


def test_only_learners_are_blended(storage: Storage) -> None:
    blends = Blends(storage, ["a", "b"])
    for known in ("a", EVERYBODY, "+a", "+a+b"):
        assert known in blends
    for unknown in ("c", "", "+c", "+a+c", "++", "a+b", 3):
        assert unknown not in blends
    with pytest.raises(FellrayError, match="no mean of clients"):
        blends.load(1, ["+a+zz"], ["client.values"])


def test_names_of_clients_cannot_be_blends(tiny_config: Callable[..., RunConfig]) -> None:
    from fellray.platform.shards import Dataset

    assert not any("+" in client for client in Dataset(tiny_config().data.path).clients)
