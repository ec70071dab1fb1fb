"""Memory: of a round by the clients that take part, and of a run by the rounds that have gone by.

    python -m fellray.jobs.memory clients OUT.json --data FOLDER    (a crowd; minutes)
    python -m fellray.jobs.memory rounds OUT.json                   (a small model, 300 rounds)

`clients`: the same federation trains one round with few and with many clients, each in processes of
its own; beside it stand actors of which each holds the whole model for one client and has trained a
step. `rounds`: what a run holds between two rounds, round after round. Memory is PSS.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from fellray.actors.plant import Plant
from fellray.actors.pool import RayPool, Shared
from fellray.actors.session import connect, ray
from fellray.actors.world import survey
from fellray.jobs.crowd import make_crowd, make_small_encoder
from fellray.jobs.display import console
from fellray.jobs.measured import WholeClient
from fellray.jobs.process_tree import Watch, list_tree, read_pss
from fellray.jobs.timings import load_average
from fellray.jobs.train import one_round
from fellray.platform import config as configs
from fellray.platform.config import RunConfig
from fellray.platform.journal import Journal
from fellray.platform.places import Demand
from fellray.platform.run import Run, open_run
from fellray.platform.seating import deal
from fellray.platform.storage import Storage

ACTIVE = (500, 2000)
SAMPLES = 4
ACTORS = 2
WHOLE = (1, 3)
"""Actors that hold the whole model."""
GOAL = 100
LIMIT = 14 * 2**30
REGISTERED, ASKED, ROUNDS, EVERY, WARM = 200, 20, 300, 10, 100
"""Of the small run; the slope is taken from round `WARM` on."""


def measure_active(data: Path, active: int, scratch: Path) -> dict[str, Any]:
    """One real round of so many clients of a crowd: memory of the whole process tree."""
    tree = _tree(f"active-{active}", data, scratch) | {"sampling": {"per_round": active}}
    manifest = json.loads((data / "manifest.json").read_text("utf-8"))
    registered = len(manifest["clients"])
    tree["clients"] = {"per_actor": -(-registered // ACTORS), "cpus": 0.01}
    del manifest
    config = configs.parse(tree, "memory")
    before = load_average()
    with Watch(os.getpid(), 0.5) as watch, _federation(config) as (run, plant):
        _turn(run, plant, 0)
        gc.collect()
        idle = _weigh()
        began = time.perf_counter()
        _turn(run, plant, 1)
        ended = time.perf_counter()
        time.sleep(2.0)  # until the watch has looked once more
        row = run.journal.rows("metrics")[-1]
        assert len(row["losses"]) == active
        cpu = watch.cpu_between(began, ended)
        return {
            "registered": registered,
            "active": active,
            "samples": row["samples"],
            "loss": row["loss"],
            "before_round_bytes": idle,
            "after_round_bytes": _weigh(),
            "peak_bytes": watch.peak_bytes,
            "processes": watch.processes,
            "round_s": ended - began,
            "cpu_s_per_client": cpu / active,
            "load": [before, load_average()],
        }


def measure_whole(data: Path, actors: int, scratch: Path) -> dict[str, Any]:
    """Actors that each hold the whole model for one client, after one step."""
    config = configs.parse(_tree("whole", data, scratch), "memory")
    world = survey(config)
    with connect(config, actors):
        model, catalogue = Shared("whole", world.backbone), Shared("catalogue", world.catalogue)
        learners = sorted(world.seats)[:actors]
        rows = [(config, learner, model, catalogue) for learner in learners]
        demand = Demand("client", actors, config.clients.cpus, 0.0)
        pool = RayPool(WholeClient, rows, demand, console.print)
        pool.map("step")
        time.sleep(1.0)
        held = _weigh()
        pool.close()
    return {"actors": actors, "bytes": held}


def compare(active: Sequence[dict[str, Any]], whole: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Slopes in bytes per client, and how many times smaller ours is."""
    few, many = active
    clients = many["active"] - few["active"]
    slopes = {
        name: (many[f"{name}_bytes"] - few[f"{name}_bytes"]) / clients
        for name in ("peak", "after_round")
    }
    per_actor = (whole[1]["bytes"] - whole[0]["bytes"]) / (whole[1]["actors"] - whole[0]["actors"])
    return {
        "bytes_per_client": slopes,
        "bytes_per_actor": per_actor,
        "times_smaller": {name: per_actor / slope for name, slope in slopes.items()},
        "peak_gib": many["peak_bytes"] / 2**30,
        "met": per_actor >= GOAL * slopes["peak"] and many["peak_bytes"] <= LIMIT,
    }


def watch_rounds(folder: Path, rounds: int, method: str) -> dict[str, Any]:
    """A small run: what it holds every `EVERY` rounds, and the slopes per 100 rounds."""
    encoder = make_small_encoder(folder / "encoder", 4, 64)
    tree = _tree("rounds", folder / "data", folder) | {
        "method": {"kind": method},
        "model": {"name": str(encoder)},
        "sampling": {"per_round": ASKED},
        "clients": {"per_actor": REGISTERED // ACTORS, "cpus": 0.01},
    }
    config = configs.parse(tree, "memory")
    make_crowd(config, REGISTERED, 0)
    seen: list[dict[str, float]] = []
    load = [load_average()]
    with _federation(config) as (run, plant):
        for t in range(rounds + 1):
            began = time.perf_counter()
            _turn(run, plant, t)
            if t % EVERY == 0:
                seen.append({"round": t, "round_s": time.perf_counter() - began} | _hold(run))
    late = [one for one in seen if one["round"] >= min(WARM, rounds // 2)]
    at = [one["round"] for one in late]
    slopes = {
        name: 100 * float(np.polyfit(at, [one[name] for one in late], 1)[0])
        for name in late[0]
        if name != "round"
    }
    return {"method": method, "seen": seen, "per_100": slopes, "load": [*load, load_average()]}


def show(found: dict[str, Any]) -> None:
    """A table of what was measured."""
    if "seen" in found:
        names = list(found["seen"][0])
        table = Table(*(name.removesuffix("_mib") for name in names), box=box.SIMPLE)
        last = len(found["seen"]) - 1
        for at in sorted({0, 1, last // 3, 2 * last // 3, last}):
            table.add_row(*(f"{found['seen'][at][name]:,.4g}" for name in names))
        console.print(table)
        slopes = {name: round(value, 3) for name, value in found["per_100"].items()}
        console.print("per 100 rounds:", slopes, {"load": found["load"]})
        return
    table = Table("active", "before MiB", "peak MiB", "after MiB", "round s", "CPU s/client")
    for row in found["active"]:
        sizes = [row[f"{n}_bytes"] for n in ("before_round", "peak", "after_round")]
        table.add_row(
            f"{row['active']:,} of {row['registered']:,}",
            *(f"{size / 2**20:,.0f}" for size in sizes),
            f"{row['round_s']:.0f}",
            f"{row['cpu_s_per_client']:.3f}",
        )
    console.print(table)
    console.print(found["goals"], [row["load"] for row in found["active"]])


def _tree(name: str, data: Path, scratch: Path) -> dict[str, Any]:
    return {
        "name": name,
        "storage": str(scratch / "runs"),
        "data": {"path": str(data), "partition": {"kind": "per_user"}, "k_core": 1},
        "train": {"rounds": 1_000_000, "local_samples": SAMPLES, "batch_size": SAMPLES},
        "server": {"engine": "torch", "cpus": 0.01, "threads": 1},
        "clients": {"cpus": 0.01},
        "evaluation": {"every": 1_000_000, "clients": 1},
    }


@contextmanager
def _federation(config: RunConfig) -> Iterator[tuple[Run, Plant]]:
    world = survey(config)
    actors = len(deal(list(world.seats), config.clients.together))
    with ExitStack() as stack:
        run = stack.enter_context(open_run(config, world.data_sha256))
        stack.enter_context(connect(config, actors))
        yield run, stack.enter_context(Plant.on_ray(config, world, run.rounds))


def _turn(run: Run, plant: Plant, round: int) -> None:
    outcome = plant.replayed(one_round, round, run.config)
    run.commit(round, outcome, plant.close_ledger(), plant.take_events())


def _weigh() -> int:
    return sum(map(read_pss, list_tree(os.getpid())))


def _hold(run: Run) -> dict[str, float]:
    gc.collect()
    held = dict.fromkeys(("driver_mib", "server_mib", "clients_mib", "ray_mib"), 0.0)
    tree = list_tree(os.getpid())
    opened = 0
    for process in tree:
        command = Path(f"/proc/{process}/cmdline").read_text("utf-8", errors="replace")
        whose = "driver" if process == os.getpid() else "ray"
        whose = {"ray::Server": "server", "ray::Client": "clients"}.get(command[:11], whose)
        held[f"{whose}_mib"] += read_pss(process) / 2**20
        opened += len(os.listdir(f"/proc/{process}/fd"))
    references = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
    return held | {
        "all_mib": sum(held.values()),
        "processes": len(tree),
        "descriptors": opened,
        "references": len(references),
        "round_folders": len(run.storage.list("rounds")),
    }


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("clients", "rounds", "active", "whole"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--count", type=int, default=0, help="of one arm: active or whole")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--method", default="fellrec")
    told = parser.parse_args()
    torch.set_num_threads(2)
    found: dict[str, Any]
    with tempfile.TemporaryDirectory() as folder:
        if told.what == "rounds":
            found = watch_rounds(Path(folder), told.rounds, told.method)
            show(found)
        elif told.what == "active":
            found = measure_active(told.data, told.count, Path(folder))
        elif told.what == "whole":
            found = measure_whole(told.data, told.count, Path(folder))
        else:
            arms = {
                what: [_arm(what, count, told.data, Path(folder)) for count in counts]
                for what, counts in (("whole", WHOLE), ("active", ACTIVE))
            }
            found = arms | {"goals": compare(arms["active"], arms["whole"])}
            show(found)
    Journal(Storage(told.out.parent)).write_json(told.out.name, found)


def _arm(what: str, count: int, data: Path, folder: Path) -> dict[str, Any]:
    """In processes of its own: memory that one arm has freed must not serve the next."""
    out = folder / f"{what}-{count}.json"
    command = [sys.executable, "-m", "fellray.jobs.memory", what, str(out)]
    subprocess.run([*command, "--data", str(data), "--count", str(count)], check=True)
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    console.print(found)
    return found


if __name__ == "__main__":
    main()
