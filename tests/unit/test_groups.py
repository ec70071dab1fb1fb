"""Groups of users by an attribute."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fellray.platform.errors import FellrayError
from fellray.platform.fedpa import form_groups
from fellray.platform.groups import find_rare, group_users, name_clients


def group(values: list[str | None], least: int) -> list[str]:
    users = pa.table({"user_id": range(len(values)), "team": pa.array(values, pa.string())})
    got: list[str] = group_users(users, "team", least).tolist()
    return got


def test_small_groups_and_users_without_a_value_join_other() -> None:
    got = group(["red", "red", "blue", "green", None, " ", "red"], 2)
    assert got == ["red", "red", "other", "other", "other", "other", "red"]


def test_a_value_called_other_is_other() -> None:
    assert group(["other", "red", "red", "blue", "other"], 2) == [
        *("other", "red", "red", "other", "other")
    ]
    assert group(["other"] * 5 + ["blue"] + ["red"] * 3, 3) == ["other"] * 6 + ["red"] * 3


def test_the_smallest_groups_join_an_other_that_is_too_small() -> None:
    got = group(["a", "b", "b", "b", "c", "c", "c", "d", "d", "d", "d"], 3)
    assert got == ["other"] * 4 + ["c"] * 3 + ["d"] * 4


def test_numbers_are_values_too() -> None:
    users = pa.table(
        {"user_id": [1, 2, 3, 4], "f": [1.0, 1.0, float("nan"), None], "on": [True] * 4}
    )
    assert group_users(users, "f", 2).tolist() == ["1", "1", "other", "other"]
    assert group_users(users, "on", 2).tolist() == ["true"] * 4


def test_what_cannot_be_grouped_is_refused() -> None:
    users = pa.table({"user_id": [1, 2], "gender": ["F", "M"], "age": [1, 2]})
    with pytest.raises(FellrayError, match=r"attribute=sex: .*no such .*known: gender, age"):
        group_users(users, "sex", 1)
    with pytest.raises(FellrayError, match="no such attribute"):
        group_users(users, "user_id", 1)
    with pytest.raises(FellrayError, match=r"min_users=2 all 2 users .*largest of 2 values has 1"):
        group_users(users, "gender", 2)


@given(
    values=st.lists(st.sampled_from(["a", "b", "c", "d", "other", None]), min_size=1, max_size=40),
    least=st.integers(1, 8),
)
def test_no_group_is_small(values: list[str | None], least: int) -> None:
    try:
        got = group(values, least)
    except FellrayError:
        return
    for name in set(got):
        assert got.count(name) >= least
    for value, name in zip(values, got, strict=True):
        assert name in (value, "other")


def test_rare_values_by_hand() -> None:
    sizes = {"a": 1, "b": 3, None: 3, "c": 3, "d": 9}
    assert find_rare(sizes, 1) == set()
    assert find_rare(sizes, 2) == {"a", None}  # of three that are alike the missing one
    assert find_rare(sizes, 5) == {"a", "b", "c", None}
    assert find_rare(sizes, 3, rare=["d"]) == {"a", "d"}


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=40), st.integers(1, 8))
def test_groups_of_users_and_of_clients_are_made_by_one_rule(values: list[str], least: int) -> None:
    group_of = form_groups(values, least)
    clients = [group_of[value].removeprefix("=").removeprefix(":") for value in values]
    try:
        assert group(values, least) == clients
    except FellrayError:
        assert set(clients) == {"other"}


def test_names_of_clients_are_names_of_files() -> None:
    groups = ["(250,500]", "[250,500)", "F", "f", "ü/.."]
    assert name_clients("follow", groups) == [
        *("follow-250-500", "follow-250-500-2", "follow-F", "follow-f-2", "follow-..")
    ]
