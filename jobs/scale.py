"""Scale: the same small training over more clients, actors and nodes, and what it took.

    python jobs/scale.py FOLDER [--registered 10,100,1000] [--sampled 10] [--actors 3] [--nodes 3]
        [--rounds 5] [--node-cpus 1] [--dry 100000] [--prices FILE] [--keep-nodes] [key=value ...]

On one machine the nodes are pretended ones; under `ray job submit`, or with cluster.address, they
are the cluster's: set `min_workers: 0` there, so that every layout begins without client nodes and
ends without them. FOLDER must be one that every node can reach; it keeps data, runs, `scale.json`
and `scale.html`.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from fellray.actors.client import deal
from fellray.actors.plant import Plant
from fellray.actors.pool import Demand, pack
from fellray.actors.session import connect
from fellray.actors.world import World, survey
from fellray.jobs.crowd import make_crowd, make_small_encoder
from fellray.jobs.display import console
from fellray.jobs.node_watch import NodeWatch, count_nodes
from fellray.jobs.pretend_nodes import IDLE_S, PretendCluster, pretend_nodes
from fellray.jobs.timed_plant import TimedPlant, split_round
from fellray.jobs.timings import BUSY, load_average
from fellray.jobs.train import one_round
from fellray.platform import config as configs
from fellray.platform.config import RunConfig, SamplingConfig
from fellray.platform.errors import FellrayError
from fellray.platform.journal import Journal
from fellray.platform.prices import EXAMPLE, Prices, load_prices
from fellray.platform.run import HASHED, Run, open_run
from fellray.platform.sampling import Sampler
from fellray.platform.scaling_page import render_scaling
from fellray.platform.storage import Storage

WAIT_S = 900.0
"""How long an autoscaler has to bring nodes, and to take them away."""


@dataclass(frozen=True)
class Layout:
    """One point of the sweep."""

    registered: int
    sampled: int
    actors: int
    nodes: int


def list_layouts(
    registered: Sequence[int], sampled: Sequence[int], actors: Sequence[int], nodes: Sequence[int]
) -> list[Layout]:
    """All combinations that make sense, each once, the smallest first.

    No more clients are sampled than there are, no more actors made than clients, no more nodes
    asked for than actors.
    """
    found = set()
    for clients, asked, processes, machines in product(registered, sampled, actors, nodes):
        processes = min(processes, clients)
        # actors hold equal shares, so that fewer may do
        processes = -(-clients // -(-clients // processes))
        found.add((clients, min(asked, clients), processes, min(machines, processes)))
    return [Layout(*one) for one in sorted(found)]


def scale(
    folder: Path,
    layouts: Sequence[Layout],
    rounds: int,
    node_cpus: int,
    dry: int,
    prices: Prices,
    lose_node: bool,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train every layout, then write `scale.json` and `scale.html`.

    Args:
        node_cpus: CPUs of one client node.
        dry: clients registered in a sweep's end that is only drawn and placed, not trained.
        lose_node: in the middle of the first layout's training, end one of its pretended nodes.
        overrides: `key=value` for the config of all layouts.

    Raises:
        FellrayError: a setting does not fit, or nodes do not come.
    """
    made = [configure(folder, layout, rounds, node_cpus, overrides) for layout in layouts]
    prepare_crowds(made)
    loads = [load_average()]
    points: list[dict[str, Any]] = []
    with _nodes(made, node_cpus, max(one.nodes for one in layouts)) as (address, pretended):
        for layout, config in zip(layouts, made, strict=True):
            console.print(f"{config.name}")
            cluster = config.cluster.model_copy(update={"address": address})
            there = config.model_copy(update={"cluster": cluster})
            loses = pretended if lose_node and not points and layout.nodes > 1 else None
            points.append(train_layout(there, layout, prices, loses))
            show_point(points[-1])
    loads.append(load_average())
    report = {
        "name": "scale",
        "nodes": "cluster" if pretended is None else "pretended",
        "idle_s": None if pretended is None else IDLE_S,
        "cpus": os.cpu_count(),
        "load_average": loads,
        "busy": max(loads) > BUSY,
        "rounds": rounds,
        "node_cpus": node_cpus,
        "prices": prices.model_dump(),
        "overrides": list(overrides),
        "points": points,
        "dry": draw_dry(made[-1], dry, layouts[-1], node_cpus) if dry else None,
    }
    journal = Journal(Storage(str(folder)))
    journal.write_json("scale.json", report)
    journal.write_text("scale.html", render_scaling(report))
    return report


def configure(
    folder: Path, layout: Layout, rounds: int, node_cpus: int, overrides: Sequence[str]
) -> RunConfig:
    """The run of a layout; its name says which, and tells this try from earlier ones."""
    per_node = -(-layout.actors // layout.nodes)
    share = f"{layout.registered}-{layout.sampled}-{layout.actors}-{layout.nodes}"
    tree = {
        "name": f"scale-{share}-{time.time_ns() // 1_000_000:x}",
        "storage": str(folder.absolute() / "runs"),
        "keep_last": 1,
        "data": {
            "path": str(folder.absolute() / f"data-{layout.registered}"),
            "k_core": 1,
            "partition": {"kind": "per_user"},
        },
        "model": {"name": str(folder.absolute() / "encoder")},
        "train": {"rounds": rounds, "local_samples": 16, "batch_size": 8},
        "sampling": {"per_round": layout.sampled},
        "clients": {
            "per_actor": -(-layout.registered // layout.actors),
            # Ray counts CPUs in ten-thousandths
            "cpus": int(node_cpus / per_node * 1e4) / 1e4,
        },
        "server": {"threads": 1, "engine": "torch"},
        "cluster": {"wait_for_nodes_s": WAIT_S},
        # training is measured: nobody is evaluated but one client, because somebody must be
        "evaluation": {"every": 1_000_000, "clients": 1, "max_users": 1},
    }
    stated = folder / "scale.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    stated.write_text(json.dumps(tree), "utf-8")  # JSON is YAML
    return configs.load(stated, overrides)


def prepare_crowds(made: Sequence[RunConfig]) -> None:
    """Data and encoder of all layouts; what is there from an earlier try is kept."""
    for config in made:
        folder = Path(config.data.path)
        if (folder / "manifest.json").exists():
            continue
        users = int(folder.name.rpartition("-")[2])
        console.print(f"making {users:,} clients in {folder}")
        encoder = Path(config.model.name)
        if not (encoder / "config.json").exists():
            make_small_encoder(encoder, 4, 64)
        make_crowd(config, users, config.data.seed)


@contextmanager
def _nodes(
    made: Sequence[RunConfig], node_cpus: int, most: int
) -> Iterator[tuple[str, PretendCluster | None]]:
    """This process connected to a cluster: the job's, the config's, or a pretended one."""
    address = os.environ.get("RAY_ADDRESS") or made[0].cluster.address
    if address != "local":
        with connect(made[0], 0):
            yield address, None
        return
    with pretend_nodes(most, node_cpus, math.ceil(made[0].server.cpus)) as pretended:
        cluster = made[0].cluster.model_copy(update={"address": pretended.address})
        with connect(made[0].model_copy(update={"cluster": cluster}), 0):
            yield pretended.address, pretended


def train_layout(
    config: RunConfig, layout: Layout, prices: Prices, loses: PretendCluster | None
) -> dict[str, Any]:
    """From no client nodes to those it needs, through its training, and back."""
    world = survey(config)
    before = count_nodes().total()
    rows: list[dict[str, Any]] = []
    with NodeWatch() as watch, open_run(config, world.data_sha256) as run:
        asked = time.time()
        with TimedPlant.on_ray(config, world, run.rounds) as plant:
            there, server = time.time(), plant.ready_at()
            lost = []
            for t in run.to_go():
                if loses and t == (config.train.rounds + 1) // 2:
                    lost.append(loses.lose_node())
                rows.append(_timed_round(run, plant, t))
            counted = count_updates(run, plant)
        ended = time.time()
        down = watch.await_count(before, WAIT_S)
        gone = time.time()
        hashes = run.rounds.hashes(config.train.rounds, HASHED, sorted(world.seats))
    came = watch.reached(before + layout.nodes) or server
    steady = [row for row in rows[2:] if not row["events"]] or rows[-1:]
    middle = {
        key: statistics.median(row[key] for row in steady)
        for key in rows[-1]
        if key not in ("round", "events")
    }
    per_round = {
        kind: s / (ended - there) * middle["seconds"]
        for kind, s in watch.seconds(there, ended).items()
    }
    return asdict(layout) | {
        "run": config.name,
        "server_s": server - asked,
        "lag_s": max(0.0, came - server),
        "actors_s": there - max(came, server),
        "capacity_s": there - asked,
        "training_s": ended - there,
        "down_s": down,
        "round": middle,
        "rounds": rows,
        "client_bytes": middle["pss"] / layout.registered,
        "sampled_bytes": middle["pss"] / layout.sampled,
        "cost_per_round": prices.price(per_round),
        "cost_whole": prices.price(watch.seconds(asked, gone)),
        "nodes_seen": [[at - asked, kinds.total() - before] for at, kinds in watch.changes],
        "lost": lost,
        "updates": counted,
        "same_hashes": hashes == _hashes_without_ray(config, world),
    }


def _timed_round(run: Run, plant: TimedPlant, t: int) -> dict[str, Any]:
    began = time.perf_counter()
    outcome = plant.replayed(one_round, t, run.config)
    events = plant.take_events()
    run.commit(t, outcome, plant.close_ledger(), events)
    seconds = time.perf_counter() - began
    clients, server = plant.close_times()
    return {
        "round": t,
        **asdict(split_round(seconds, clients, server)),
        "calls_per_batch": statistics.fmean(server.calls or [0]),
        "tokens_per_batch": statistics.fmean(server.tokens or [0]),
        "occupancy": statistics.fmean(server.tokens or [0]) / run.config.server.max_tokens,
        "pss": sum(one.pss for one in clients),
        "events": events,
    }


def count_updates(run: Run, plant: Plant) -> dict[str, int]:
    """How often the sampled clients' updates were counted, by the run's records."""
    last = run.config.train.rounds
    asked = {(t, client) for t in range(1, last + 1) for client in plant.sample(t)}
    trained = Counter(
        (row["round"], client)
        for row in run.journal.rows("metrics")
        for client in row.get("losses", ())
    )
    sent: Counter[tuple[int, str]] = Counter()
    for row in run.journal.rows("ledger"):
        if row["kind"] == "adapter_up":
            sent[row["round"], row["client"]] += row["messages"]
    return {
        "asked": len(asked),
        "once": sum(trained[one] == sent[one] == 1 for one in asked),
        "missing": sum(not trained[one] for one in asked),
        "more": sum(trained[one] > 1 or sent[one] > 1 for one in asked),
        "of_others": len((trained.keys() | sent.keys()) - asked),
    }


def _hashes_without_ray(config: RunConfig, world: World) -> dict[str, str]:
    """The same training in this process: no actor, no node, nothing that could be lost."""
    plain = config.model_copy(update={"name": f"{config.name}-plain"})
    with (
        open_run(plain, world.data_sha256) as run,
        Plant.inline(plain, world, run.rounds) as plant,
    ):
        for t in run.to_go():
            outcome = plant.replayed(one_round, t, plain)
            run.commit(t, outcome, plant.close_ledger(), plant.take_events())
        return run.rounds.hashes(plain.train.rounds, HASHED, sorted(world.seats))


def draw_dry(config: RunConfig, clients: int, layout: Layout, node_cpus: int) -> dict[str, Any]:
    """So many clients registered, drawn from and placed; nothing is trained."""
    names = [f"u{i:07d}" for i in range(clients)]
    began = time.perf_counter()
    rule = SamplingConfig(per_round=layout.sampled)
    sampler = Sampler(rule, config.seed, names, np.ones(clients))
    made = time.perf_counter()
    for t in range(100):
        sampler.sample(t)
    drawn = time.perf_counter()
    hosts = deal(names, -(-clients // layout.actors))
    demand = Demand("client", len(hosts), config.clients.cpus, 0.0)
    placed = pack([demand], [{"CPU": float(node_cpus)}] * layout.nodes)
    return {
        "registered": clients,
        "sampled": layout.sampled,
        "actors": len(hosts),
        "nodes": layout.nodes,
        "placed": placed["client"],
        "per_actor": len(hosts[0]),
        "register_s": made - began,
        "draw_s": (drawn - made) / 100,
    }


def show_point(point: Mapping[str, Any]) -> None:
    """A layout in three lines."""
    middle, updates = point["round"], point["updates"]
    down = "not within the time" if point["down_s"] is None else f"{point['down_s']:.0f} s"
    console.print(
        f"  nodes 0 -> {point['nodes']} in {point['lag_s']:.0f} s, all actors after "
        f"{point['capacity_s']:.0f} s; nodes gone again after: {down}; lost: {len(point['lost'])}\n"
        f"  round {middle['seconds']:.2f} s: compute {middle['own'] + middle['trunk']:.2f}, wait "
        f"{middle['queue'] + middle['slowest']:.2f}, transfer {middle['transfer']:.2f}, driver "
        f"{middle['driver']:.2f}; {middle['calls_per_batch']:.1f} calls a batch\n"
        f"  {updates['once']} of {updates['asked']} updates counted once, "
        f"hashes {'equal' if point['same_hashes'] else 'NOT EQUAL'} to those without Ray",
        soft_wrap=True,
    )


def show_scaling(report: Mapping[str, Any]) -> None:
    """The table on the terminal."""
    table = Table(
        *("registered", "sampled", "actors", "nodes", "capacity\ns", "lag\ns", "round\ns", "MiB"),
        f"{report['prices']['currency']}\na round",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for point in report["points"]:
        table.add_row(
            *(str(point[key]) for key in ("registered", "sampled", "actors", "nodes")),
            *(f"{point[key]:.1f}" for key in ("capacity_s", "lag_s")),
            f"{point['round']['seconds']:.2f}",
            f"{point['round']['pss'] / 2**20:.0f}",
            f"{point['cost_per_round']:.5f}",
        )
    console.print(table)


DEFAULTS = {"registered": "10,100,1000", "sampled": "10", "actors": "3", "nodes": "3"}
"""The sweep, each a list with commas."""


def read_layouts(**lists: str) -> list[Layout]:
    """The layouts of four lists of numbers.

    Raises:
        FellrayError: a list holds something that is no number.
    """
    numbers = {}
    for name, text in lists.items():
        words = [word.strip() for word in text.split(",")]
        if bad := [word for word in words if not word.isdecimal() or int(word) < 1]:
            raise FellrayError(
                f"--{name} {text}: {bad[0]!r} is no count; write --{name} {DEFAULTS[name]}"
            )
        numbers[name] = [int(word) for word in words]
    return list_layouts(**numbers)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--node-cpus", type=int, default=1)
    parser.add_argument("--dry", type=int, default=100_000)
    parser.add_argument("--prices", type=Path, default=EXAMPLE)
    parser.add_argument("--keep-nodes", action="store_true", help="lose no pretended node")
    told = parser.parse_args()
    layouts = read_layouts(**{name: getattr(told, name) for name in DEFAULTS})
    prices = load_prices(told.prices)
    lose = not told.keep_nodes
    report = scale(
        *(told.folder, layouts, told.rounds, told.node_cpus, told.dry, prices, lose),
        told.overrides,
    )
    show_scaling(report)


if __name__ == "__main__":
    main()
