"""Scale: the same small training over more clients, actors and nodes, and what it took.

    python jobs/scale.py FOLDER [--registered 10,100,1000] [--sampled 10] [--actors 3] [--nodes 3]
        [--rounds 5] [--node-cpus 1] [--dry 100000] [--prices FILE] [--keep-nodes] [key=value ...]

On one machine the nodes are pretended ones; under `ray job submit`, or with cluster.address, they
are the cluster's: set `min_workers: 0` there, so that every layout begins without client nodes and
ends without them. FOLDER must be one that every node can reach; it keeps data, runs, `scale.json`
and `scale.html`.
"""

import argparse
import math
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fellray.actors.plant import Plant
from fellray.actors.session import connect
from fellray.actors.world import World, survey
from fellray.jobs.display import console
from fellray.jobs.layouts import (
    DEFAULTS,
    WAIT_S,
    Layout,
    configure,
    draw_dry,
    prepare_crowds,
    read_layouts,
)
from fellray.jobs.node_watch import NodeWatch, count_nodes
from fellray.jobs.pretend_nodes import IDLE_S, PretendCluster, pretend_nodes
from fellray.jobs.timed_plant import TimedPlant, split_round
from fellray.jobs.timings import BUSY, load_average
from fellray.jobs.train import one_round
from fellray.platform.config import RunConfig
from fellray.platform.journal import Journal
from fellray.platform.prices import EXAMPLE, Prices, load_prices
from fellray.platform.run import Run, open_run
from fellray.platform.scaling_page import render_scaling
from fellray.platform.storage import Storage
from fellray.platform.summary import HASHED


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
            # Ray has put a handler of its own there, with which the cluster would stay
            signal.signal(signal.SIGTERM, signal.default_int_handler)
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
