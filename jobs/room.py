"""Room: whether a service's replicas find places on the nodes, before Serve is asked to start them.

Serve itself waits for a place without end, and says nothing. It must not know what a replica does.
"""

from collections.abc import Mapping, Sequence

from fellray.actors.session import ray
from fellray.jobs.console import tell
from fellray.platform.errors import FellrayError
from fellray.platform.places import Demand, name_amounts, pack
from fellray.serve.args import Args

NODES_S = 600.0
"""How long an autoscaler may take to bring nodes for replicas that have no place."""


def await_room(args: Args, nodes_may_come: bool) -> None:
    """See that the replicas that a service starts with find places.

    Args:
        nodes_may_come: on a cluster an autoscaler may bring nodes, which are waited for `NODES_S`.

    Raises:
        FellrayError: they do not; names the arguments, what is asked and what the nodes have.
    """
    missing = find_missing(args, _read_nodes())
    if missing and nodes_may_come:
        tell(f"{missing}; nodes that an autoscaler may bring are waited for {NODES_S:.0f} s")
        if _bring_nodes(args):
            return
        missing = find_missing(args, _read_nodes()) or "what the nodes have is held by others"
        missing += f", after {NODES_S:.0f} s too"
    if missing:
        raise FellrayError(f"{missing}; ask for less, or serve where there is more")
    if held := find_held(args, ray.available_resources()):
        tell(f"{held}; it is waited for without end, and Ctrl-C ends that")


def find_missing(args: Args, nodes: Sequence[Mapping[str, float]]) -> str:
    """Which replicas find no place on nodes with so much `CPU` and `GPU`; empty: all find one."""
    demands = _read_demands(args)
    placed = pack(demands, nodes)
    for demand in demands:
        if placed[demand.name] < demand.count:
            return (
                f"{demand.name}s={demand.count} cpus={demand.cpus:g} "
                f"{demand.name}_gpus={demand.gpus:g}: {placed[demand.name]} of {demand.count} "
                f"replicas find a place; each asks for {demand.needs}, and the nodes have "
                f"{' + '.join(map(name_amounts, nodes))}"
            )
    return ""


def find_held(args: Args, free: Mapping[str, float]) -> str:
    """What the replicas ask for, where less is free on all nodes together; empty: it is not."""
    demands = _read_demands(args)
    asked = {
        "CPU": sum(demand.count * demand.cpus for demand in demands),
        "GPU": sum(demand.count * demand.gpus for demand in demands),
    }
    if all(size <= free.get(name, 0.0) for name, size in asked.items()):
        return ""
    left = {name: free.get(name, 0.0) for name in asked}
    return (
        f"the replicas ask for {name_amounts(asked)}, and others hold all but {name_amounts(left)}"
    )


def _read_demands(args: Args) -> list[Demand]:
    demands = [
        Demand("recommender", args.recommenders, args.cpus, args.recommender_gpus),
        Demand("trunk", args.trunks, args.cpus, args.trunk_gpus),
    ]
    # whoever needs no GPU must not take the CPUs beside one
    return sorted(demands, key=lambda demand: -demand.gpus)


def _read_nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _bring_nodes(args: Args) -> bool:
    """Whether all replicas found places together; while they have none, an autoscaler sees that."""
    each = [
        {"CPU": demand.cpus, "GPU": demand.gpus}
        for demand in _read_demands(args)
        for _ in range(demand.count)
    ]
    asked = [{name: size for name, size in one.items() if size} for one in each]
    group = ray.util.placement_group([one for one in asked if one], strategy="PACK")
    try:
        return bool(group.wait(NODES_S))
    finally:
        ray.util.remove_placement_group(group)
