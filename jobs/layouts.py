"""Layouts: the points of a sweep over clients, actors and nodes, and the runs they become.

It makes their data and their configs, and places a crowd that is too large to be trained. It does
not know how nodes come or how a run goes.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fellray.jobs.crowd import make_crowd, make_small_encoder
from fellray.jobs.display import console
from fellray.platform import config as configs
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.places import Demand, pack
from fellray.platform.sampling import Sampler
from fellray.platform.seating import deal
from fellray.platform.train_config import SamplingConfig

WAIT_S = 900.0
"""How long an autoscaler has to bring nodes, and to take them away."""
DEFAULTS = {"registered": "10,100,1000", "sampled": "10", "actors": "3", "nodes": "3"}
"""The sweep, each a list with commas."""


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
