"""Groups of clients: who is in which, by the config or by an attribute of the prepared data.

It must not know what a group has in common. Letters: C clients.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fellray.platform.adapters import name_blocks
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.fedpa import form_groups
from fellray.platform.fedpa_lora import CLIENTS, FedpaLora
from fellray.platform.levels import level_of
from fellray.platform.shards import Dataset
from fellray.platform.split import Cut
from fellray.platform.user_attributes import of_users


def group_learners(config: RunConfig, data: Dataset) -> dict[str, str]:
    """The group of every learner, none smaller than `method.min_group_size`; empty where the method
    has no groups.

    Raises:
        FellrayError: `method.groups` names a client that there is not, or an attribute that the
            prepared data has not or in which a client's users differ; or all clients would be in
            one group though groups are named.
    """
    method = config.method
    if not isinstance(method, FedpaLora):
        return {}
    if isinstance(method.groups, str):
        values = _read_attribute(method.groups, data)
    else:
        values = _read_map(method.groups, data)
    group_of = form_groups(values, method.min_group_size)
    names = [group_of[value] for value in values]
    if method.groups and len(set(names)) == 1:
        raise FellrayError(
            f"method.groups: with method.min_group_size={method.min_group_size} all {len(names)} "
            "clients would be one group; lower it, name larger groups, or leave method.groups out"
        )
    return dict(zip(data.clients, names, strict=True))


def number_groups(groups: Mapping[str, str], clients: Sequence[str]) -> dict[str, Tensor]:
    """`Meta.groups` of some clients; none where there are no groups."""
    if not groups:
        return {}
    number = {name: at for at, name in enumerate(sorted(set(groups.values())))}
    return {CLIENTS: torch.tensor([number[groups[c]] for c in clients], dtype=torch.int64)}


def describe_groups(
    config: RunConfig, groups: Mapping[str, str], cut: Cut
) -> dict[str, dict[str, Any]]:
    """For the run's record: who is in which group, and of each level how many numbers a client's
    adapters have and whether they are sent. Empty where there are no groups."""
    if not groups:
        return {}
    members: dict[str, list[str]] = {}
    for client, group in sorted(groups.items()):
        members.setdefault(group, []).append(client)
    levels: dict[str, Any] = {}
    for side, sites in (("client", cut.outer), ("trunk", cut.sites["trunk"])):
        for name, columns in name_blocks(sites, config.model.lora.r).items():
            key = f"{level_of(name)}, {side}"
            level = levels.setdefault(key, {"parameters": 0, "sent": config.method.sends(name)})
            level["parameters"] += columns.stop - columns.start
    return {"members": members, "levels": levels}


def _read_map(groups: Mapping[str, str], data: Dataset) -> list[str | None]:
    """Each client's group [C]."""
    for client, group in groups.items():
        if client not in data.clients:
            near = difflib.get_close_matches(client, data.clients, n=1, cutoff=0)[0]
            raise FellrayError(
                f"method.groups: {client!r} (group {group!r}) is not among the "
                f"{len(data.clients)} clients of this run, the nearest name is {near!r}"
            )
    return [groups.get(client) for client in data.clients]


def _read_attribute(attribute: str, data: Dataset) -> list[str | None]:
    """Each client's value [C]."""
    known = [] if data.users is None else data.users.column_names[1:]
    if data.users is None or attribute not in known:
        has = f"knows {', '.join(known)}" if known else "says nothing of its users"
        raise FellrayError(
            f"method.groups={attribute}: the prepared data {has}; choose one of its attributes, "
            "prepare it with data.users=<file>, or write each client's group (client: group)"
        )
    values: list[str | None] = []
    for client in data.clients:
        found = _texts(of_users(data.users, data.shard(client).users)[attribute])
        if len(found) > 1:
            some = ", ".join(repr(value) for value in found[:3])
            raise FellrayError(
                f"method.groups={attribute}: the users of client {client!r} have several values of "
                f"it ({some}), and a client is in one group; prepare with data.partition.kind="
                "per_user or by_attribute, or write each client's group (client: group)"
            )
        values.append(found[0] or None)
    return values


def _texts(column: pa.ChunkedArray) -> list[str]:
    """The different values, sorted; missing ones are empty."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    found: list[str] = np.unique(
        pc.utf8_trim_whitespace(column.cast(pa.string()).fill_null("")).to_numpy()
    ).tolist()
    return found
