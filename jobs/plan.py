"""Plan: before a run, how many clients fit where, what a round will take, and why.

It asks the nodes what they have, has a probe measure one client actor and one server, and shows
what `platform/capacity.py` makes of it. `clients.per_actor=auto` is settled here for every job.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.table import Table

from fellray.actors.session import connect, find_address, ray
from fellray.actors.world import World, survey
from fellray.jobs.display import console
from fellray.jobs.doctor import read_memory
from fellray.jobs.probe import run_probe
from fellray.jobs.process_tree import list_tree, read_pss
from fellray.jobs.timings import load_average
from fellray.platform import config as configs
from fellray.platform.adapters import Site
from fellray.platform.capacity import Layout, Node, Workload
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.layout import lay_out
from fellray.platform.run import Run
from fellray.platform.shards import Dataset
from fellray.platform.split import PARTS, plan_cut

KILL_SHARE = 0.05
"""Share of a machine's memory that must stay free: at less Ray ends actors."""
COUNTED = "counted are the nodes that are there now, none that an autoscaler may bring"


def plan(config: RunConfig) -> tuple[Layout, Workload]:
    """Measure and lay out.

    Raises:
        FellrayError: the run would not fit, or what keeps the run itself from starting.
    """
    world = survey(config)
    config = world.own.settle(config)
    return _plan(config, world), count_work(config, world)


def settle(config: RunConfig, world: World) -> RunConfig:
    """The config with the clients' cuts, and a number for `clients.per_actor=auto`: the one with
    which the run was begun, or, in a new run, a measured one.

    Raises:
        FellrayError: as `plan`.
    """
    config = world.own.settle(config)
    if config.clients.per_actor != "auto":
        return config
    run = Run(config)
    if run.storage.exists("config.json"):
        per_actor = run.read_json("config.json")["clients"]["per_actor"]
    else:
        layout = _plan(config, world)
        per_actor = layout.per_actor
        console.print(f"clients.per_actor=auto: {per_actor}, {layout.why}")
        if find_address(config) != "local":
            console.print(COUNTED)
    clients = config.clients.model_copy(update={"per_actor": per_actor})
    return config.model_copy(update={"clients": clients})


def count_work(config: RunConfig, world: World) -> Workload:
    """What a round has to do, from the config and the prepared data's manifest."""
    clients = len(world.seats)
    entries = Dataset(config.data.path).manifest["clients"]
    cap = config.evaluation.max_users or sys.maxsize
    users = [sum(min(cap, entries[c]["valid"]) for c in own) for own in world.seats.values()]
    share = min(1.0, (config.evaluation.clients or clients) / clients)
    usual = config.train.local_samples
    samples = max(world.own.samples_of(own, usual) for own in world.seats.values())
    sent = {"all": PARTS, "trunk_only": ("trunk",), "none": ()}[config.train.share]
    cut = plan_cut(world.backbone, config.model)
    sites: list[Site] = [site for part in sent for site in cut.sites[part]]
    return Workload(
        clients=clients,
        asked=min(clients, config.sampling.asked or clients),
        steps=-(-samples // config.train.batch_size),
        users=math.ceil(share * sum(users)),
        every=config.evaluation.every,
        parameters=sum(site.num_parameters(config.model.lora.r) for site in sites),
    )


def show_plan(config: RunConfig, layout: Layout, work: Workload) -> None:
    """The plan on the terminal."""
    table = Table(
        title=f"{config.name}: {work.clients} clients, {work.asked} in a round, "
        f"{work.steps} local steps each",
        box=box.SIMPLE,
        show_header=False,
    )
    each = f"{layout.per_actor} (clients.per_actor), {layout.side_by_side} train side by side"
    table.add_row("clients in an actor", f"{each}: {layout.why}")
    table.add_row("client actors", str(layout.actors))
    if find_address(config) != "local":
        table.add_row("nodes", COUNTED)
    for share in layout.shares:
        words = f"up to {share.actors} client actors"
        if share.per_gpu:
            words += f", {share.per_gpu} on a GPU"
        if share.gpu_bytes:
            words += f"; the fullest GPU needs about {share.gpu_bytes / 2**30:.1f} GiB"
        parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in share.parts.items())
        words += f"\nabout {share.bytes / 2**30:.2f} of {share.node_bytes / 2**30:.1f} GiB: {parts}"
        table.add_row(share.node, words)
    table.add_row(
        "a round",
        f"about {layout.round_s:.1f} s: training {layout.training_s:.1f}, mixing "
        f"{layout.mixing_s:.1f}, validation {layout.validation_s:.1f}"
        + (f" every {work.every} rounds" if work.every > 1 else "")
        + f"\ntraining waits for {layout.bound}",
    )
    table.add_row(
        "bytes of a round",
        f"about {layout.training_bytes / 1e6:.1f} MB in training, "
        f"{layout.validation_bytes / 1e6:.1f} MB in validation",
    )
    table.add_row(
        f"{config.train.rounds} rounds",
        f"about {config.train.rounds * layout.round_s / 60:.1f} min",
    )
    table.add_row(
        "measured",
        f"by a probe, load average {load_average():.1f} on {os.cpu_count()} cores here"
        "\nmemory is refused with a margin; times hold for a machine as busy as now",
    )
    console.print(table)


def _plan(config: RunConfig, world: World) -> Layout:
    own = find_address(config) == "local"
    nodes = [_read_machine()] if own else []  # before the probe takes of it
    with connect(config, 1):
        probed = run_probe(config, world)
        if not own:
            nodes = _read_cluster()
        else:
            nodes = [replace(nodes[0], gpus=int(ray.cluster_resources().get("GPU", 0)))]
    nodes = [replace(node, gpu_bytes=probed.gpu_bytes) for node in nodes]
    try:
        return lay_out(config, probed.probe, count_work(config, world), nodes)
    except FellrayError as error:
        if own:
            raise
        waits = (
            "; where clients.per_actor is a number, `fellray train` waits for the others"
            if config.cluster.wait_for_nodes_s
            else ""
        )
        raise FellrayError(f"{error}; {COUNTED}{waits}") from None


def _read_machine() -> Node:
    """This one, on which the run's own Ray will give out as many CPUs as are asked."""
    available, total = read_memory(Path("/"))
    held = sum(map(read_pss, list_tree(os.getpid())))  # the run's already, and in the probe again
    return Node(
        name="this machine",
        cpus=math.inf,
        cores=len(os.sched_getaffinity(0)),
        gpus=0,
        memory_bytes=available + held - KILL_SHARE * total,
        driver=True,
    )


def _read_cluster() -> list[Node]:
    """As Ray counts them. Its `memory` is what it leaves to workers beside its object store."""
    here = ray.get_runtime_context().get_node_id()
    return [
        Node(
            name=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            cores=max(1, int(node["Resources"].get("CPU", 0.0))),
            gpus=int(node["Resources"].get("GPU", 0)),
            memory_bytes=node["Resources"].get("memory", 0.0),
            driver=node["NodeID"] == here,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def main() -> None:
    """`python jobs/plan.py CONFIG [key=value ...]`, also under `ray job submit`."""
    path, *overrides = sys.argv[1:]
    config = configs.load(path, overrides)
    show_plan(config, *plan(config))


if __name__ == "__main__":
    main()
