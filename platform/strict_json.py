"""Strict JSON: what any reader can read, so neither NaN nor infinity.

It must not know what is written, nor where it goes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fellray.platform.errors import FellrayError

_PLAIN = json.JSONEncoder(allow_nan=False)
"""Made once: records are many short lines."""


def to_json(value: Any, where: str, indent: int | None = None) -> str:
    """A value as strict JSON.

    Raises:
        FellrayError: a number is not finite; `where` and the field are named.
    """
    encoder = _PLAIN if indent is None else json.JSONEncoder(allow_nan=False, indent=indent)
    try:
        return encoder.encode(value)
    except ValueError:
        field = _find_not_finite(value, "")
        if field is None:
            raise
        raise FellrayError(
            f"{where}: {field} is not finite. A loss that diverged is the usual cause: lower "
            "train.learning_rate or set train.clip"
        ) from None


def _find_not_finite(value: Any, field: str) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{field or 'the value'} ({value})"
    parts: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    found = (_find_not_finite(v, f"{field}.{k}" if field else str(k)) for k, v in parts)
    return next((f for f in found if f is not None), None)
