"""Bench: what the split, the merged batch, the protocol and the engine cost, with MiniLM's weights.

Every figure is a ratio of two arms that were timed in turn in one run with equal, stated threads on
the same two cores. It trains on the demo data, in a folder that is gone afterwards.

Shapes: L tokens of a message, d width, C clients, P parameters of one client.
"""

from typing import Any

CORES = 2
"""Every process of the run is held on this many cores."""
TURNS = 5
"""Timed turns of each arm, at least."""
CLIENTS = 5
NEVER = 1_000_000
"""A round that does not come: nothing is evaluated in between."""

Figure = dict[str, Any]
"""`name`, `ratio`, `goal`, `arms` with their seconds, and what else there is to say."""
