"""Which server an actor's clients have their trunk adapters on: its home, as long as that is there.

A server's rows are a cache of committed pages, so moving an actor moves no data: the other server
reads the pages when the actor next begins a round.
"""

from collections.abc import Collection
from itertools import cycle


def assign(actors: int, servers: int, ready: Collection[int]) -> list[int]:
    """Each actor's server.

    Neighbours have the same home, and homes are as even as they can be. Only those whose home is
    not ready are dealt out over the servers that are; when it is back, so are they.

    Args:
        actors: how many, at least as many as servers.
        servers: how many there are when all are ready.
        ready: those that can be asked, at least one.
    """
    homes = [actor * servers // actors for actor in range(actors)]
    others = cycle(sorted(ready))
    return [home if home in ready else next(others) for home in homes]
