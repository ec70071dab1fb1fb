"""Prices: what nodes of each kind cost for a time. It knows neither nodes nor runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fellray.platform.errors import FellrayError

EXAMPLE = Path(__file__).with_name("prices.yaml")
"""A table to copy and change."""


class Prices(BaseModel):
    """A price table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: str
    per_hour: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    """Kind of node -> price of one node for an hour."""

    def price(self, seconds: Mapping[str, float]) -> float:
        """Of so many node-seconds of each kind.

        Raises:
            FellrayError: a kind has no price.
        """
        if unknown := sorted(seconds.keys() - self.per_hour.keys()):
            raise FellrayError(
                f"nodes of kind {unknown[0]!r} have no price (known: "
                f"{', '.join(sorted(self.per_hour))}); add it under per_hour in a copy of "
                f"{EXAMPLE} and name that with --prices"
            )
        return sum(self.per_hour[kind] * s / 3600 for kind, s in sorted(seconds.items()))


def load_prices(path: Path) -> Prices:
    """The table in a YAML file.

    Raises:
        FellrayError: the file is missing, or is no price table.
    """
    try:
        return Prices.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except OSError as error:
        raise FellrayError(f"{path}: cannot be read ({error.strerror}); copy {EXAMPLE}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FellrayError(f"{path}: is not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise FellrayError(
            f"{path}: {where}: {first['msg']}; a price table looks like {EXAMPLE}"
        ) from None
