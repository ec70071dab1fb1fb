"""What schemathesis is told of our data, so that it comes further than to a client that is none.

It runs in a process of its own, which finds this file by SCHEMATHESIS_HOOKS.
"""

from collections.abc import Iterator
from typing import Any

import schemathesis

EXACT = 2**53
"""A larger number with a point is refused: it cannot be known which whole number it was."""


def find_numbers(value: Any) -> Iterator[float]:
    """All in a body."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from find_numbers(one)
    elif isinstance(value, float):
        yield value


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    return not any(abs(number) > EXACT for number in find_numbers(case.body))


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Every other valid client, user and item is one that is there; times are past."""
    if isinstance(case.body, dict | list):
        case.body = _name_known(case.body)
    path = case.path_parameters or {}
    if "clients" in case.operation.path and len(str(path.get("id", ""))) % 2:
        path["id"] = "c0"
    return case


def _name_known(value: Any) -> Any:
    if isinstance(value, list):
        return [_name_known(one) for one in value]
    if not isinstance(value, dict):
        return value
    named = {key: _name_known(one) for key, one in value.items()}
    client = named.get("client")
    if isinstance(client, str) and 1 <= len(client) <= 200 and len(client) % 2:
        named["client"] = "c0"
    for key in ("user_id", "item_id"):
        number = named.get(key)
        if type(number) is int and abs(number) < 2**63 and number % 2 and "title" not in named:
            named[key] = 2
    time = named.get("timestamp")
    if type(time) in (int, float) and 0 <= time < 2**63:
        named["timestamp"] = time % 10**9
    return named
