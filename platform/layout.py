"""Layout: how a run will lie on the nodes, from what a probe measured, or why it cannot.

Pure arithmetic: it must not know how anything was measured or how Ray places an actor. Memory is
counted for the worst that Ray may do with the actors, times for the mean. Bytes and seconds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fellray.platform.capacity import Layout, Node, Probe, Share, Workload
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.places import pack, read_demands
from fellray.platform.slots import KEPT

MARGIN = 1.25
"""A plan is refused where this much of the expected memory is not there: a run of hours has a
fragmented heap and longer rows than a probe of seconds."""
DRIVER_COPIES = 3
"""Of all sent weights, in the driver at the end of a round: as they came, joined, mixed."""
DRIVER_MATRICES = 6
"""[C, C] in fp64 at once, while a method plans."""
ALIKE = 1.05
"""Rounds within this factor of the shortest count as equal; then fewer processes are better."""
GIB = 2**30


class _Misfit(Exception):
    """Why a layout does not work: what it asks, what there is."""


def lay_out(config: RunConfig, probe: Probe, work: Workload, nodes: Sequence[Node]) -> Layout:
    """The layout that the config asks for; for `clients.per_actor=auto` the one with the shortest
    rounds of all that fit, and of equal ones that with the fewest processes.

    Raises:
        FellrayError: it does not fit; says what was asked, what exists and what would fit.
    """
    auto = config.clients.per_actor == "auto"
    sizes = list(_sizes(work, nodes)) if auto else [min(config.clients.together, work.clients)]
    fitting: list[Layout] = []
    reasons: list[str] = []
    for per_actor in sizes:
        try:
            fitting.append(_try(config, probe, work, nodes, per_actor))
        except _Misfit as misfit:
            reasons.append(str(misfit))
    if not fitting:
        raise FellrayError(_refuse(config, probe, work, nodes, reasons[-1]))
    if not auto:
        return fitting[0]
    shortest = min(layout.round_s for layout in fitting)
    chosen = min(
        (one for one in fitting if one.round_s <= ALIKE * shortest), key=lambda one: one.actors
    )
    words = f"the shortest rounds of {len(sizes)} ways to deal {work.clients} clients"
    if reasons:
        words += f"; {len(reasons)} of them do not fit"
    return replace(chosen, why=words)


def _sizes(work: Workload, nodes: Sequence[Node]) -> Iterator[int]:
    """Clients per actor worth a thought, fewest first: more actors than cores gain nothing."""
    most = min(work.clients, max(1, sum(node.cores for node in nodes)))
    yield from sorted({-(-work.clients // actors) for actors in range(1, most + 1)})


def _try(
    config: RunConfig, probe: Probe, work: Workload, nodes: Sequence[Node], per_actor: int
) -> Layout:
    actors = -(-work.clients // per_actor)
    if actors < config.server.count:
        raise _Misfit(f"{actors} client actors cannot use {config.server.count} servers")
    taking_part = min(per_actor, work.asked)
    side = min(config.clients.slots, taking_part)
    shares = _place(config, probe, work, nodes, actors, per_actor, side)
    training_s, bound = _time_training(config, probe, work, nodes, actors, side)
    mixing_s = probe.mixing_s.at(work.asked)
    validation_s = _time_validation(config, probe, work, nodes, actors)
    return Layout(
        per_actor=per_actor,
        actors=actors,
        side_by_side=side,
        shares=shares,
        training_s=training_s,
        mixing_s=mixing_s,
        validation_s=validation_s,
        round_s=training_s + mixing_s + validation_s / work.every,
        bound=bound,
        training_bytes=work.asked * (work.steps * probe.step_traffic + probe.update_traffic),
        validation_bytes=work.users * probe.user_traffic,
        why="as clients.per_actor says",
    )


def _place(
    config: RunConfig,
    probe: Probe,
    work: Workload,
    nodes: Sequence[Node],
    actors: int,
    per_actor: int,
    side: int,
) -> tuple[Share, ...]:
    """The most that each node may get.

    All must find a place together. Ray knows CPUs and GPUs and not what a client weighs, so a node
    must also hold as many actors as its own CPUs and GPUs let Ray put there, and as many servers.
    """
    _check_places(config, nodes, actors)
    client = _client_memory(probe, work, per_actor, side)
    servers = config.server.count
    its_asked, its_actors = -(-work.asked // servers), -(-actors // servers)
    batch = _batch(config, probe, its_asked, its_actors, side)
    server = probe.server_bytes.at(batch) + probe.waiting_server_bytes * max(
        0, max(its_asked, min(-(-work.clients // servers), KEPT)) - batch
    )
    once = {
        "weights, catalogue and messages": probe.store_bytes
        + work.asked * probe.update_traffic
        + min(actors * side, work.asked) * probe.step_traffic,
        "shared code": probe.library_bytes,
    }
    driver = (
        probe.rest_bytes
        + DRIVER_COPIES * 4 * work.asked * work.parameters
        + DRIVER_MATRICES * 8 * work.asked**2
    )
    client_gpu, server_gpu = probe.client_gpu_bytes.at(side), probe.server_gpu_bytes.at(batch)
    shares = []
    for node in nodes:
        served = _server_places(config, node)
        fixed = dict(once)
        if node.driver:
            fixed["driver and Ray"] = driver
        if served:
            fixed["server" if served == 1 else f"{served} servers"] = served * server
        # on the only node the servers take their part of what Ray gives out
        most = _places(config, node, actors, served if len(nodes) == 1 else 0)
        per_gpu = min(most, config.clients.gpu_denominator)
        gpu, holds = _fill_gpu(config, served, most, server_gpu, client_gpu)
        if node.gpu_bytes and gpu * MARGIN > node.gpu_bytes:
            raise _Misfit(
                f"{node.name}: a GPU that holds {holds} needs about {_gib(gpu * MARGIN)} with a "
                f"margin of {MARGIN - 1:.0%}, and has {_gib(node.gpu_bytes)}"
            )
        parts = fixed | {f"{most} client actors": most * client}
        share = Share(node.name, most, per_gpu, parts, gpu, node.memory_bytes)
        if share.bytes * MARGIN > node.memory_bytes:
            raise _Misfit(_no_memory(node, share))
        shares.append(share)
    return tuple(shares)


def _check_places(config: RunConfig, nodes: Sequence[Node], actors: int) -> None:
    """As the run itself does before it starts."""
    resources = [{"CPU": node.cpus, "GPU": float(node.gpus)} for node in nodes]
    placed = pack(read_demands(config, actors), resources)
    servers = config.server.count
    if placed["server"] < servers:
        if servers == 1:
            raise _Misfit("no node has a place for the server")
        raise _Misfit(f"the nodes have places for {placed['server']} of {servers} servers")
    if placed["client"] < actors:
        beside = "server" if servers == 1 else f"{servers} servers"
        raise _Misfit(
            f"beside the {beside} the nodes have places for {placed['client']} of {actors} client "
            "actors"
        )


def _fill_gpu(
    config: RunConfig, served: int, most: int, server_bytes: float, client_bytes: float
) -> tuple[float, str]:
    """Of all that Ray may put onto one GPU together what needs the most memory, and its name."""
    share, clients = config.server.gpus, config.clients.gpu_denominator
    together = min(served, max(1, int(1 / share + 1e-6))) if share else 0
    ways = []
    for servers in range(together + 1):
        beside = min(most, max(0, int((1 - servers * share) * clients + 1e-6)))
        names = [f"{servers} server{'s' * (servers > 1)}"] * (servers > 0)
        names += [f"{beside} client actors"] * (beside > 0)
        ways.append((servers * server_bytes + beside * client_bytes, " and ".join(names)))
    return max(ways)


def _client_memory(probe: Probe, work: Workload, per_actor: int, side: int) -> float:
    """Of one client actor, at its peak."""
    held = max(min(per_actor, work.asked), min(per_actor, KEPT))
    return probe.client_bytes.at(side) + probe.waiting_client_bytes * (held - side)


def _batch(config: RunConfig, probe: Probe, asked: int, actors: int, side: int) -> int:
    """Clients in a server's largest batch: one actor's request is never divided."""
    merged = int(config.server.max_tokens / probe.tokens)
    return min(asked, max(side, min(actors * side, merged)))


def _server_places(config: RunConfig, node: Node) -> int:
    """How many servers Ray can put on a node."""
    most = float(config.server.count)
    for has, asked in ((node.cpus, config.server.cpus), (node.gpus, config.server.gpus)):
        if asked:
            most = min(most, has / asked + 1e-6)
    return int(most)


def _places(config: RunConfig, node: Node, actors: int, servers: int) -> int:
    """How many client actors Ray can put on a node, beside so many servers."""
    cpus = node.cpus - servers * config.server.cpus
    gpus = node.gpus - servers * config.server.gpus
    most = float(actors)
    if config.clients.cpus:
        most = min(most, cpus / config.clients.cpus + 1e-6)
    if config.clients.gpu_denominator:
        most = min(most, gpus * config.clients.gpu_denominator + 1e-6)
    return max(0, int(most))


def _time_training(
    config: RunConfig,
    probe: Probe,
    work: Workload,
    nodes: Sequence[Node],
    actors: int,
    side: int,
) -> tuple[float, str]:
    """The longest of what must follow each other, and what that is."""
    each = -(-work.asked // actors)
    waves = -(-each // side)
    own = work.steps * (waves * probe.own_s.first + (each - waves) * probe.own_s.further)
    served = work.steps * (waves * probe.served_s.first + (each - waves) * probe.served_s.further)
    busy = min(actors, work.asked)
    return _longest(config, nodes, own, served, busy)


def _time_validation(
    config: RunConfig, probe: Probe, work: Workload, nodes: Sequence[Node], actors: int
) -> float:
    each = work.users / actors
    longest, _ = _longest(
        config, nodes, each * probe.user_own_s, each * probe.user_served_s, actors
    )
    return longest


def _longest(
    config: RunConfig, nodes: Sequence[Node], own: float, served: float, actors: int
) -> tuple[float, str]:
    """Args: own, served: seconds of one actor. actors: that work at the same time."""
    cores = sum(node.cores for node in nodes)
    work = actors * (own * config.clients.threads + served * config.server.threads)
    bounds = {
        "one actor's clients, which follow each other": own + served,
        "the server, one batch after the other": -(-actors // config.server.count) * served,
        "the cores": work / cores,
    }
    if config.clients.gpu_denominator:
        gpus = max(1, sum(node.gpus for node in nodes))
        bounds["the GPUs"] = actors * (own + (served if config.server.gpus else 0.0)) / gpus
    bound = max(bounds, key=lambda name: bounds[name])
    return bounds[bound], bound


def _no_memory(node: Node, share: Share) -> str:
    need = ", ".join(f"{name} {_gib(size)}" for name, size in share.parts.items())
    return (
        f"{node.name} has {_gib(node.memory_bytes)} of memory free, and up to {share.actors} "
        f"client actors there need {_gib(share.bytes * MARGIN)} with a margin of {MARGIN - 1:.0%} "
        f"({need})"
    )


def _refuse(
    config: RunConfig, probe: Probe, work: Workload, nodes: Sequence[Node], reason: str
) -> str:
    asked = (
        f"clients.per_actor={config.clients.per_actor} clients.slots={config.clients.slots} "
        f"for {work.clients} clients, {work.asked} in a round"
    )
    if config.clients.gpu_denominator:
        asked += f", clients.gpu_denominator={config.clients.gpu_denominator}"
    return f"the run would not fit: asked {asked}; {reason}; {_way_out(config, probe, work, nodes)}"


def _way_out(config: RunConfig, probe: Probe, work: Workload, nodes: Sequence[Node]) -> str:
    """The nearest change of the config that fits, really tried."""

    def fits(per_actor: int, **changed: float) -> bool:
        other = config.clients.model_copy(update=changed)
        try:
            _try(config.model_copy(update={"clients": other}), probe, work, nodes, per_actor)
        except _Misfit:
            return False
        return True

    asked = config.clients.per_actor
    fewest = work.clients if asked == "auto" else min(asked, work.clients)
    sizes = sorted({-(-work.clients // actors) for actors in range(1, work.clients // fewest + 1)})
    if size := _first(sizes, fits):
        return f"clients.per_actor={size} would fit"
    widest = max(node.cpus for node in nodes)
    if math.isfinite(widest) and config.clients.cpus:
        for most in range(int(widest / config.clients.cpus), 0, -1):
            cpus = _up(widest / (most + 0.999))
            if fits(sizes[0], cpus=cpus):
                return f"clients.cpus={cpus:g} would fit: Ray puts at most {most} on a node then"
    for share in range(config.clients.gpu_denominator - 1, 0, -1):
        if size := _first(sizes, lambda one: fits(one, gpu_denominator=share)):  # noqa: B023
            return f"clients.gpu_denominator={share} clients.per_actor={size} would fit"
    slots = min(config.clients.slots, work.asked)
    while slots := slots // 2:
        if size := _first(sizes, lambda one: fits(one, slots=slots)):
            return f"clients.per_actor={size} clients.slots={slots} would fit"
    return "nothing that clients.* can say would fit: use larger nodes, or a smaller model or batch"


def _first(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    return next((size for size in sizes if fits(size)), None)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _up(value: float) -> float:
    """Rounded up to two digits behind the point."""
    return math.ceil(value * 100) / 100
