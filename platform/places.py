"""Places: how many equal actors the nodes' CPUs and GPUs let Ray start, as far as arithmetic tells.

It must not know Ray, nor what an actor weighs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fellray.platform.config import RunConfig


@dataclass(frozen=True)
class Demand:
    """What a row of equal actors asks for."""

    name: str
    count: int
    cpus: float
    gpus: float

    @property
    def needs(self) -> str:
        """What each asks for, in words."""
        return name_amounts({"CPU": self.cpus, "GPU": self.gpus})


def read_demands(config: RunConfig, actors: int) -> tuple[Demand, Demand]:
    """What a run asks for: its servers, which are placed first, and so many client actors."""
    servers, clients = config.server, config.clients
    share = clients.gpu_denominator
    return (
        Demand("server", servers.count, servers.cpus, servers.gpus),
        Demand("client", actors, clients.cpus, 1 / share if share else 0.0),
    )


def pack(demands: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """How many actors of each row find a place, first fit in the order given.

    Args:
        nodes: `CPU` and `GPU` of each, which may be infinite.
    """
    free = [{"CPU": node.get("CPU", 0.0), "GPU": node.get("GPU", 0.0)} for node in nodes]
    placed = dict.fromkeys((d.name for d in demands), 0)
    for demand in demands:
        for node in free:
            fits = [
                have / need + 1e-6
                for have, need in ((node["CPU"], demand.cpus), (node["GPU"], demand.gpus))
                if need > 0
            ]
            here = int(min([demand.count - placed[demand.name], *fits]))
            placed[demand.name] += here
            node["CPU"] -= here * demand.cpus
            node["GPU"] -= here * demand.gpus
    return placed


def name_amounts(resources: Mapping[str, float]) -> str:
    """The CPUs and GPUs of some resources, in words."""
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
