"""The no-op round: what a round costs that trains nothing, by the number of registered clients.

    python -m fellray.jobs.noop OUT.json [--registered 1000 100000] [--rival PYTHON SCRIPT]

Real actors, real rounds: sampling, seats, leases, pages, the mixture, the commit, the journal. Only
the local steps are left out: a client's update is its start and a thousandth. All federations live
at once and take turns, a round each, so that what slows the machine slows all. The rival is a
script `SCRIPT N K ROUNDS FLOATS` that prints a line `RESULT {json}`; it runs before and after ours.
"""

import argparse
import gc
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from fellray.actors.client import Client
from fellray.actors.plant import Plant
from fellray.actors.session import connect
from fellray.actors.world import survey
from fellray.jobs.crowd import make_crowd, make_small_encoder
from fellray.jobs.display import console
from fellray.jobs.process_tree import Watch, list_tree, read_cpu
from fellray.jobs.timings import Spread, load_average, ratios, spread
from fellray.jobs.train import one_round
from fellray.platform import config as configs
from fellray.platform.config import RunConfig
from fellray.platform.journal import Journal
from fellray.platform.messages import Lease
from fellray.platform.run import Run, open_run
from fellray.platform.storage import Storage

FLOATS = 65_536
"""What a client sends and receives: 0.25 MB."""
SAMPLED = 100
ROUNDS = 30
WARM = 3
"""Rounds without a clock."""
ACTORS = 2
"""Client actors of a federation, however many are registered."""
BLOCKS, WIDTH, RANK = 9, 128, 16
"""Eight blocks on the client's side make `FLOATS`; the trunk has one."""
GOAL, FLAT = 10.0, 0.1


class Idle(Client):
    """A client whose local training is no step at all."""

    def _learn(
        self, round: int, learners: tuple[str, ...], slots: Tensor, lease: Lease, until: float
    ) -> tuple[list[float], list[int]]:
        self._slots.bank.values_SP[slots] += 1e-3
        return [1.0] * len(learners), [1] * len(learners)


class IdlePlant(Plant):
    """Real actors that do not train."""

    _client = Idle


class Federation:
    """One run and its actors."""

    def __init__(self, config: RunConfig, stack: ExitStack):
        world = survey(config)
        began = time.perf_counter()
        self.registered = len(world.seats)
        self.config = config
        self.run: Run = stack.enter_context(open_run(config, world.data_sha256))
        self._plant = stack.enter_context(IdlePlant.on_ray(config, world, self.run.rounds))
        self.start_s = time.perf_counter() - began
        self._round = 0

    def turn(self) -> None:
        """One round, committed."""
        outcome = self._plant.replayed(one_round, self._round, self.config)
        self.run.commit(self._round, outcome, self._plant.close_ledger(), self._plant.take_events())
        if outcome.reports:
            assert len(outcome.reports.meta.clients) == SAMPLED
            assert outcome.reports.theta_CP.shape[1] >= FLOATS
        self._round += 1


def measure_ours(
    folder: Path, registered: Sequence[int], rounds: int, method: str
) -> dict[str, Any]:
    """Seconds of each federation's rounds, and CPU seconds of the whole process tree."""
    encoder = folder / "encoder"
    if not encoder.exists():
        make_small_encoder(encoder, BLOCKS, WIDTH)
    plans = [_configure(folder, encoder, count, method) for count in registered]
    for config, count in zip(plans, registered, strict=True):
        if config.data.path.exists():
            continue
        began = time.perf_counter()
        make_crowd(config, count, 0)
        console.print(f"{count:,} clients prepared in {time.perf_counter() - began:.0f} s")
    load = [load_average()]
    with ExitStack() as stack:
        stack.enter_context(connect(plans[0], ACTORS * len(plans) + len(plans)))
        arms = [Federation(config, stack) for config in plans]
        for _ in range(1 + WARM):
            for arm in arms:
                arm.turn()
        walls: list[list[float]] = [[] for _ in arms]
        order = list(range(len(arms)))
        gc.collect()
        used = _cpu()
        for _ in range(rounds):
            for at in order:
                began = time.perf_counter()
                arms[at].turn()
                walls[at].append(time.perf_counter() - began)
            order.reverse()
        cpu = _cpu() - used
        load.append(load_average())
        rows = [
            {
                "registered": arm.registered,
                "start_s": arm.start_s,
                "round_s": wall,
                "results_per_s": SAMPLED / spread(wall).median,
                "over_first": asdict(ratios(wall, walls[0])),
            }
            for arm, wall in zip(arms, walls, strict=True)
        ]
    return {
        "method": method,
        "rows": rows,
        "cpu_s_per_result": cpu / (rounds * SAMPLED * len(plans)),
        "load": load,
    }


def measure_rival(python: str, script: str, registered: int, rounds: int) -> dict[str, Any]:
    """What the rival's script says of itself, and the CPU seconds of its rounds."""
    load = [load_average()]
    command = [python, script, str(registered), str(SAMPLED), str(rounds + 1), str(FLOATS)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_plain()
    )
    assert process.stdout is not None
    found: dict[str, Any] = {}
    told = 0.0
    with Watch(process.pid, 2.0) as watch:
        for line in process.stdout:
            if line.startswith("RESULT "):
                told, found = time.perf_counter(), json.loads(line.removeprefix("RESULT "))
        process.wait()
    assert found, f"{script} printed no RESULT"
    first = told - found["total_s"] + found["startup_s"]
    cpu = watch.cpu_between(first, first + sum(found["round_s"]))
    measured = found["round_s"][1:]  # its first round starts its workers
    results = SAMPLED / spread(measured).median
    return {
        "registered": registered,
        "round_s": measured,
        "results_per_s": results,
        "cpu_s_per_result": cpu / (len(found["round_s"]) * SAMPLED),
        "peak_pss_mb": found["peak_pss_mb"],
        "load": [*load, load_average()],
    }


def compare(ours: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The goals: so many times the rival where it was measured, and flat in the registered."""
    speed = {row["registered"]: row["results_per_s"] for row in ours["rows"]}
    times = {}
    for registered in sorted({rival["registered"] for rival in rivals} & speed.keys()):
        best = max(r["results_per_s"] for r in rivals if r["registered"] == registered)
        times[registered] = speed[registered] / best
    most = max(ours["rows"], key=lambda row: int(row["registered"]))["over_first"]["median"]
    return {
        "times_rival": times,
        "faster": all(value >= GOAL for value in times.values()) if times else None,
        "most_over_fewest": most,
        "flat": abs(most - 1) <= FLAT,
    }


def show(found: dict[str, Any]) -> None:
    """The table."""
    table = Table("registered", "who", "round s", "results/s", "over first", box=box.SIMPLE)
    for row in found["ours"]["rows"]:
        table.add_row(
            f"{row['registered']:,}",
            f"fellray, {found['ours']['method']}",
            _spread(spread(row["round_s"])),
            f"{row['results_per_s']:.0f}",
            "{median:.3f} ({low:.2f}-{high:.2f})".format(**row["over_first"]),
        )
    for row in found["rivals"]:
        table.add_row(
            f"{row['registered']:,}",
            "rival",
            _spread(spread(row["round_s"])),
            f"{row['results_per_s']:.0f}",
            "",
        )
    console.print(table)
    ours = found["ours"]
    console.print(
        f"CPU per client result: {1e3 * ours['cpu_s_per_result']:.2f} ms, rival "
        + (", ".join(f"{1e3 * r['cpu_s_per_result']:.1f} ms" for r in found["rivals"]) or "none")
    )
    console.print(found["goals"], {"load": ours["load"]})


def _configure(folder: Path, encoder: Path, registered: int, method: str) -> RunConfig:
    tree = {
        "name": f"noop-{registered}",
        "storage": str(folder / f"runs-{os.getpid()}"),
        "data": {
            "path": str(folder / f"data-{registered}"),
            "partition": {"kind": "per_user"},
            "k_core": 1,
        },
        "model": {"name": str(encoder), "cut": 4, "top": 4, "lora": {"r": RANK}},
        "method": {"kind": method},
        "train": {"rounds": 1_000_000},
        "sampling": {"per_round": SAMPLED},
        "clients": {"per_actor": -(-registered // ACTORS), "cpus": 0.01},
        "server": {"engine": "torch", "cpus": 0.01, "threads": 1},
        "evaluation": {"every": 1_000_000, "clients": 1},
    }
    return configs.parse(tree, "noop")


def _cpu() -> float:
    """Seconds that this process and all it started have used."""
    return sum(read_cpu(process) or 0.0 for process in list_tree(os.getpid()))


def _plain() -> dict[str, str]:
    """The rival's Ray must not meet ours."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}


def _spread(value: Spread) -> str:
    return f"{value.median:.3f} ({value.low:.3f}-{value.high:.3f})"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--registered", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--method", default="fedavg")
    parser.add_argument("--folder", type=Path, help="keeps what was prepared for another time")
    parser.add_argument("--rival", nargs=2, metavar=("PYTHON", "SCRIPT"))
    parser.add_argument("--rival-registered", type=int, nargs="*", default=[1000, 5000])
    told = parser.parse_args()
    torch.set_num_threads(2)
    asked = told.rival_registered if told.rival else []
    python, script = told.rival or ("", "")
    rivals = [measure_rival(python, script, count, told.rounds) for count in asked]
    with tempfile.TemporaryDirectory() as scratch:
        folder = told.folder or Path(scratch)
        ours = measure_ours(folder, told.registered, told.rounds, told.method)
    rivals += [measure_rival(python, script, count, told.rounds) for count in reversed(asked)]
    found = {"ours": ours, "rivals": rivals, "goals": compare(ours, rivals)}
    show(found)
    Journal(Storage(told.out.parent)).write_json(told.out.name, found)


if __name__ == "__main__":
    main()
