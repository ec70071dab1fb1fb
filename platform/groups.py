"""Groups: users or clients who have the same value of an attribute, none of them small.

It must not know where attributes come from, nor what a group is for. Letters: U users.
"""

import re
from collections.abc import Collection, Mapping
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fellray.platform.errors import FellrayError

OTHER = "other"


def find_rare(
    sizes: Mapping[str | None, int], least: int, rare: Collection[str] = ()
) -> set[str | None]:
    """The values that are one group together, since too few have each of them.

    Those that fewer than `least` have; while together they have fewer, the smallest other joins
    them: among equals a missing one, then by name.

    Args:
        sizes: value -> how many have it; None is a missing one.
        rare: values that belong there however many have them.
    """
    order = sorted(sizes, key=lambda value: (sizes[value], value is not None, value or ""))
    found = {value for value in order if sizes[value] < least or value in rare}
    together = sum(sizes[value] for value in found)
    for value in order:
        if not 0 < together < least:
            break
        if value not in found:
            found.add(value)
            together += sizes[value]
    return found


def group_users(users: pa.Table, attribute: str, min_users: int) -> np.ndarray:
    """Of each user the group's name, text [U]: the value, or `other`.

    A value with fewer than `min_users` users joins `other`, as do users without a value (null or
    empty) and those whose value is called so. While `other` itself has fewer, the smallest group
    joins it, by name among equals.

    Args:
        users: one row per user, a column per attribute.

    Raises:
        FellrayError: there is no such attribute, or all users would be in `other`.
    """
    known = [name for name in users.column_names if name != "user_id"]
    if attribute not in known:
        raise FellrayError(
            f"data.partition.attribute={attribute}: the users have no such attribute; known: "
            f"{', '.join(known)}"
        )
    value = users[attribute]
    if pa.types.is_floating(value.type):
        value = pc.if_else(pc.is_nan(value), None, value)
    value = pc.utf8_trim_whitespace(value.cast(pa.string()).fill_null(""))
    value_U = pc.if_else(pc.equal(value, ""), OTHER, value).to_numpy(zero_copy_only=False)
    names, group_U, sizes = np.unique(value_U, return_inverse=True, return_counts=True)
    size_of: dict[str | None, int] = dict(zip(names.tolist(), sizes.tolist(), strict=True))
    merged = find_rare(size_of, min_users, rare=[OTHER])
    if len(merged) == len(names):
        raise FellrayError(
            f"data.partition.attribute={attribute}: with data.partition.min_users={min_users} all "
            f"{len(value_U)} users would be in one group, {OTHER!r}: the largest of {len(names)} "
            f"values has {sizes.max(initial=0)} users; lower min_users or choose another of "
            f"{', '.join(known)}"
        )
    labels = np.array([OTHER if name in merged else name for name in size_of], object)
    of_group: np.ndarray = labels[group_U]
    return of_group


def name_clients(attribute: str, groups: list[str]) -> list[str]:
    """A client id for each group, fit for a file's name: `gender-F`; equal ones get a number."""
    names: list[str] = []
    for group in groups:
        plain = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", p).strip("-") for p in (attribute, group))
        taken = {name.lower() for name in names}  # some file systems fold case
        tries = (plain if n == 1 else f"{plain}-{n}" for n in count(1))
        names.append(next(name for name in tries if name.lower() not in taken))
    return names
