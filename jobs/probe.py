"""Probe: one client actor and one server, really started, trained for two steps and weighed.

They train through the `Plant` of every run, in a scratch folder that is deleted. What follows from
the figures is `platform/capacity.py`'s business. Linux only.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fellray.actors.plant import Plant
from fellray.actors.pool import RayPool, Shared, check_places
from fellray.actors.remote import RayRemote
from fellray.actors.world import World
from fellray.jobs.measured import STATUS
from fellray.jobs.process_tree import list_tree, read_pss
from fellray.jobs.weighed import WeighedClient, WeighedServer, Weight
from fellray.platform import config as configs
from fellray.platform.aggregation import reduce
from fellray.platform.capacity import Line, Probe
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.messages import LedgerRow
from fellray.platform.own import ALIKE
from fellray.platform.places import read_demands
from fellray.platform.reader import EVALUATION_ROWS
from fellray.platform.rounds import Rounds
from fellray.platform.split import SIDES, plan_cut
from fellray.platform.storage import Storage

CLIENTS = 4
"""Clients that train side by side in the second measurement; the first has one."""
STEPS = 2
"""Local steps of each."""
UPDATES = ("adapter_up", "adapter_down", "loss")
"""Kinds of the ledger that a round has once per client."""
BYTES_PER_PARAMETER = 24
"""fp32: adapters, AdamW's two moments, the gradient, the round's start, a copy to send."""


@dataclass(frozen=True)
class Taken:
    """A round of a few clients."""

    clients: int
    own_s: float
    served_s: float
    mixing_s: float
    user_own_s: float
    user_served_s: float
    activations: int
    steps_traffic: int
    update_traffic: int
    user_traffic: float
    client: Weight
    server: Weight


@dataclass(frozen=True)
class Probed:
    """What the probe found."""

    probe: Probe
    gpu_bytes: float
    """Memory of the GPU that either side ran on, of two unlike ones the larger; 0 without."""


def run_probe(config: RunConfig, world: World) -> Probed:
    """Measure, on the Ray that this process is connected to.

    Raises:
        FellrayError: this system does not tell what a process weighs, or there is no place for one
            client actor and the server.
    """
    if not STATUS.exists():
        raise FellrayError(f"the probe reads {STATUS}: run it on Linux, or set clients.per_actor")
    learners = tuple(sorted(world.seats, key=lambda one: (-world.sizes[one], one))[:CLIENTS])
    small = _shrink(config, len(learners))
    # whoever differs has a smaller rank or other steps: measured is a step of the largest
    few = replace(world, seats={one: world.seats[one] for one in sorted(learners)}, own=ALIKE)
    storage = Storage(config.storage)
    try:
        with _plant(small, few, Rounds(storage.sub(small.name))) as (plant, rounds, pools):
            return _measure(small, few, plant, rounds, pools)
    finally:
        storage.delete(small.name)


def _shrink(config: RunConfig, learners: int) -> RunConfig:
    """The same steps, but few of them, by few clients in one actor."""
    tree = config.model_dump(mode="json")
    tree["name"] = f"{config.name}-probe-{uuid.uuid4().hex}"  # nobody's run
    tree["train"]["local_samples"] = min(
        config.train.local_samples, STEPS * config.train.batch_size
    )
    tree["sampling"] = {}
    tree["clients"] |= {"per_actor": learners, "slots": learners}
    tree["evaluation"]["clients"] = None
    return configs.parse(tree, "probe")


@contextmanager
def _plant(
    config: RunConfig, world: World, rounds: Rounds
) -> Iterator[tuple[Plant, Rounds, tuple[RayPool, RayPool]]]:
    """As `Plant.on_ray`, of actors that are weighed."""
    far, near = read_demands(config, 1)
    far = replace(far, count=1)
    wait_s = config.cluster.wait_for_nodes_s
    if not wait_s:
        check_places([far, near])
    learners, key = tuple(sorted(world.seats)), world.key(config)
    trunk = Shared(f"trunk {key}", world.trunk_side(config))
    servers = RayPool(WeighedServer, [(config, learners, trunk, rounds)], far, _ignore, wait_s)
    try:
        here = config.data.model_copy(update={"path": config.data.path.absolute()})
        row = (
            config.model_copy(update={"data": here}),
            0,
            world.seats,
            Shared(f"client {key}", world.client_side(config)),
            Shared(f"catalogue {key}", world.catalogue),
            RayRemote(servers.handles),
            rounds,
        )
        clients = RayPool(WeighedClient, [row], near, _ignore, wait_s)
    except BaseException:
        servers.close()
        raise
    with Plant(config, world, rounds, servers, clients) as plant:
        yield plant, rounds, (servers, clients)


def _measure(
    config: RunConfig,
    world: World,
    plant: Plant,
    rounds: Rounds,
    pools: tuple[RayPool, RayPool],
) -> Probed:
    learners = tuple(sorted(world.seats))
    rounds.commit(0, plant.stage_start(), {})
    plant.fit(1, learners[:1])  # first touches
    one = _take(config, plant, rounds, pools, 1, learners[:1])
    many = _take(config, plant, rounds, pools, 2, learners)
    actors = {many.client.process, many.server.process}
    tree = [process for process in list_tree(os.getpid()) if process not in actors]
    probe = _conclude(config, world, one, many, sum(map(read_pss, tree)))
    return Probed(probe, max(many.client.gpu_has, many.server.gpu_has))


def _take(
    config: RunConfig,
    plant: Plant,
    rounds: Rounds,
    pools: tuple[RayPool, RayPool],
    round: int,
    clients: Sequence[str],
) -> Taken:
    """One round and its validation."""
    servers, actors = pools
    plant.close_ledger()
    reports = plant.fit(round, clients)
    ((own, served),) = actors.map("clocked")
    began = time.perf_counter()
    plan = config.method.plan(reports.meta)
    staged = plant.install(reports, plan, reduce(plan, reports.theta_CP, reports.blocks))
    rounds.commit(round, staged, {})
    mixing_s = time.perf_counter() - began
    entered = plant.close_ledger()
    cap = min(config.evaluation.max_users or EVALUATION_ROWS, EVALUATION_ROWS)
    (scores,) = actors.map("evaluate", [round], [1], [cap], [tuple(clients)])
    users = max(1, sum(score.users for score in scores.values()))
    ((user_own, user_served),) = actors.map("clocked")
    validated = sum(row.bytes for row in plant.close_ledger())
    (client,), (server,) = actors.map("weigh"), servers.map("weigh")
    return Taken(
        clients=len(clients),
        own_s=own,
        served_s=served,
        mixing_s=mixing_s,
        user_own_s=user_own / users,
        user_served_s=user_served / users,
        activations=_bytes(entered, lambda kind: kind == "activation"),
        steps_traffic=_bytes(entered, lambda kind: kind not in UPDATES),
        update_traffic=_bytes(entered, lambda kind: kind in UPDATES),
        user_traffic=validated / users,
        client=client,
        server=server,
    )


def _bytes(ledger: Sequence[LedgerRow], wanted: Callable[[str], bool]) -> int:
    return sum(row.bytes for row in ledger if wanted(row.kind))


def _conclude(config: RunConfig, world: World, one: Taken, many: Taken, rest_bytes: float) -> Probe:
    """What the two rounds say, by what they differ in."""
    samples = config.train.local_samples * max(map(len, world.seats.values()))
    steps, count = -(-samples // config.train.batch_size), many.clients
    cut, lora = plan_cut(world.backbone, config.model), config.model.lora

    def line(read: Callable[[Taken], float], per: int = 1) -> Line:
        return Line.through(read(one) / per, read(many) / per, count)

    def waiting(sides: Sequence[str]) -> float:
        sites = [site for side in sides for site in cut.sites[side]]
        each = BYTES_PER_PARAMETER + 4 * config.method.local().vectors
        return each * sum(site.num_parameters(lora.r) for site in sites)

    tokens, catalogue = world.catalogue.tokens, world.catalogue
    frozen = [*world.backbone.arrays.values(), catalogue.vectors_Id, catalogue.popularity_I]
    width = catalogue.vectors_Id.shape[1]
    return Probe(
        client_bytes=line(lambda taken: taken.client.own_bytes),
        server_bytes=line(lambda taken: taken.server.own_bytes),
        client_gpu_bytes=line(lambda taken: taken.client.gpu_bytes),
        server_gpu_bytes=line(lambda taken: taken.server.gpu_bytes),
        waiting_client_bytes=waiting(SIDES),
        waiting_server_bytes=waiting(("trunk",)),
        library_bytes=max(many.client.shared_bytes, many.server.shared_bytes),
        store_bytes=sum(array.nbytes for array in (*frozen, tokens.ids, tokens.offsets)),
        rest_bytes=rest_bytes,
        tokens=many.activations / (4 * width * steps * count),
        own_s=line(lambda taken: taken.own_s, steps),
        served_s=line(lambda taken: taken.served_s, steps),
        mixing_s=line(lambda taken: taken.mixing_s),
        user_own_s=many.user_own_s,
        user_served_s=many.user_served_s,
        step_traffic=many.steps_traffic / (steps * count),
        update_traffic=many.update_traffic / count,
        user_traffic=many.user_traffic,
    )


def _ignore(loss: str) -> None:
    """An actor that is lost and begun again costs the probe its time, and nothing else."""
