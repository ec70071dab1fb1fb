"""How a service is measured: the settings of `fellray bench serve`."""

from collections.abc import Sequence
from dataclasses import dataclass

CORES = 2
"""Of the machine, for all processes together."""


@dataclass(frozen=True)
class Settings:
    """How it is measured."""

    users: int = 1000
    zipf: float = 0.0
    """Exponent of how often each user asks; 0: all alike."""
    connections: int = 64
    seconds: float = 4.0
    """Of every load in a turn."""
    turns: int = 5
    seed: int = 0
    adapters: Sequence[int] = (64, 512, 4096)
    """Clients whose adapters are asked for; empty: that part is left out."""
    rate: float | None = None
    """One open loop of so many requests a second, instead of those at shares of saturation."""
    order: int = 20_000
    """Requests after which a load asks the same again."""
    settings: Sequence[str] = ()
    """`key=value` for the service."""
