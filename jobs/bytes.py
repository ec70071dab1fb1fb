"""Bytes: what one client exchanges in one round, by how it crosses the cut, and what that costs.

Every arm trains on the same histories and is tested on all held-out users. Arms that lose nothing
are trained once and held against the arm whose bits they must have. It takes about twenty minutes
on two cores.
"""

import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from fellray.actors.plant import Plant
from fellray.actors.world import World, survey
from fellray.jobs.display import console
from fellray.jobs.figures import vary
from fellray.jobs.full_model import FullModel
from fellray.jobs.timings import load_average
from fellray.platform import config as configs
from fellray.platform.aggregation import reduce
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.journal import Journal
from fellray.platform.ledger import total
from fellray.platform.outcome import pool
from fellray.platform.reader import Reader
from fellray.platform.rounds import Rounds
from fellray.platform.sampling import Sampler
from fellray.platform.shards import Dataset
from fellray.platform.split import PARTS, plan_cut
from fellray.platform.storage import Storage

BUDGET = (
    "method.kind=fedavg",
    "train.rounds=3",
    "train.local_samples=32",
    "sampling.per_round=4",
    "clients.per_actor=1000",
    "clients.crews=1",
    "clients.threads=2",
    "server.threads=2",
    "server.engine=torch",
    "evaluation.max_users=null",
)
"""What is tried unless the command says otherwise. FedAvg, so that all rows mix in the same way."""
SEEDS = (0, 1, 2)
FULL_MODEL_RATE = 3e-5
"""AdamW's learning rate for all weights: usual for this encoder."""
CROSSINGS = 4
"""Of a step in the plain protocol: two up, two down."""

_HELD = {"keep_rows_mib": 512}
_INT8 = {"activation": "int8", "gradient": "int8"}
_INT4 = {"activation": "int4", "gradient": "int4"}


@dataclass(frozen=True)
class Arm:
    """A way over the cut."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    like: str | None = None
    """The arm whose adapters it must come to, bit for bit: it is trained with the first seed only.
    """


PLAIN = "split, float32"
ARMS = {
    PLAIN: Arm(),
    "rows held at the server": Arm({"wire": _HELD}, PLAIN),
    "int8": Arm({"wire": _INT8}),
    "int4": Arm({"wire": _INT4}),
    "bottom frozen, rows held": Arm({"model": {"freeze_bottom": True}, "wire": _HELD}),
    "top 0, means": Arm({"model": {"top": 0}, "wire": {"pooled": True}}),
    "all together, int8": Arm(
        {
            "model": {"top": 0, "freeze_bottom": True},
            "wire": {"pooled": True, **_HELD, **_INT8},
        }
    ),
    "all together, int4": Arm(
        {
            "model": {"top": 0, "freeze_bottom": True},
            "wire": {"pooled": True, **_HELD, **_INT4},
        }
    ),
}
FULL = "full-model FedAvg"


def measure(config: RunConfig, seeds: Sequence[int], log: Path | None = None) -> dict[str, Any]:
    """The whole table.

    Args:
        log: a file with a line for each training; what is in it is not trained again.
    """
    world = survey(config)
    trained = _read(log)

    def once(name: str, seed: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = f"{name} {seed} {configs.dump(config)}"
        if key not in trained:
            trained[key] = work()
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, trained[key]]) + "\n")
        console.print(f"{name}, seed {seed}: NDCG@10 {trained[key]['ndcg@10']:.4f}")
        return trained[key]

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*ARMS, FULL)}
    untrained = once("untrained", seeds[0], lambda: _test(FullModel(config, world, 0.0)))
    for seed in seeds:
        for name, arm in ARMS.items():
            if arm.like and found[name]:
                found[name].append(found[arm.like][-1])
                continue
            one = vary(config, **arm.settings).model_copy(update={"seed": seed})
            found[name].append(once(name, seed, lambda one=one: _train(one, world)))  # type: ignore[misc]
            if arm.like and found[name][0]["hashes"] != found[arm.like][0]["hashes"]:
                raise FellrayError(f"{name}: the adapters are not those of {arm.like}")
        one = config.model_copy(update={"seed": seed})
        found[FULL].append(once(FULL, seed, lambda one=one: _train_whole(one, world)))  # type: ignore[misc]
    return _tabulate(config, world, seeds, found) | {"untrained": untrained["ndcg@10"]}


def count_naive(config: RunConfig, world: World) -> float:
    """Bytes per client and round of the plain protocol, for the histories of the run's rounds: four
    crossings in float32 of batches padded to their longest row; adapters and losses as ever."""
    data, dim = Dataset(config.data.path), world.backbone.dim
    learners = tuple(sorted(world.seats))
    sizes = np.array([world.sizes[learner] for learner in learners])
    sampler = Sampler(config.sampling, config.seed, learners, sizes)
    crossed = rounds = 0
    for round in range(1, config.train.rounds + 1):
        for place in sampler.sample(round):
            client = learners[place]
            shards = {client: [data.shard(own) for own in world.seats[client]]}
            for batch, _ in Reader(config, world.catalogue.tokens, shards).steps(round):
                lengths_N = batch.rows.lengths_N
                crossed += len(lengths_N) * int(lengths_N.max()) * dim * 4 * CROSSINGS
            rounds += 1
    outer = sum(
        s.num_parameters(config.model.lora.r) for s in plan_cut(world.backbone, config.model).outer
    )
    return crossed / rounds + 2 * 4 * outer + 8


def _train(config: RunConfig, world: World) -> dict[str, Any]:
    """One run in this process: bytes per client and round, test NDCG@10, hashes of the adapters."""
    taken: list[dict[str, float]] = []
    names = ["client.values", "trunk.values"]
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(Storage(folder))
        with Plant.inline(config, world, rounds) as plant:
            rounds.commit(0, plant.stage_start(), {})
            for t in range(1, config.train.rounds + 1):
                clients = plant.sample(t)
                reports = plant.fit(t, clients)
                plan = config.method.plan(reports.meta)
                mixed = reduce(plan, reports.theta_CP)
                rounds.commit(t, plant.install(reports, plan, mixed), {})
                kinds = total(plant.close_ledger())
                taken.append({kind: size / len(clients) for kind, size in kinds.items()})
            scores = plant.evaluate(config.train.rounds, 2, config.evaluation.max_users)
        hashes = rounds.hashes(config.train.rounds, names, sorted(world.seats))
    by_kind = {kind: statistics.fmean(row.get(kind, 0.0) for row in taken) for kind in taken[0]}
    return {
        "ndcg@10": pool(scores)["ndcg@10"],
        "by_kind": by_kind,
        "bytes": sum(by_kind.values()),
        "hashes": hashes,
    }


def _train_whole(config: RunConfig, world: World) -> dict[str, Any]:
    learners = tuple(sorted(world.seats))
    sizes = np.array([world.sizes[learner] for learner in learners])
    sampler = Sampler(config.sampling, config.seed, learners, sizes)
    model = FullModel(config, world, FULL_MODEL_RATE)
    for t in range(1, config.train.rounds + 1):
        model.fit(t, [learners[place] for place in sampler.sample(t)])
    return _test(model)


def _test(model: FullModel) -> dict[str, Any]:
    return {"ndcg@10": pool(model.test())["ndcg@10"]}


def _tabulate(
    config: RunConfig,
    world: World,
    seeds: Sequence[int],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Rows with their bytes, the ratios and NDCG@10 over seeds."""
    cut = plan_cut(world.backbone, config.model)
    adapters = sum(s.num_parameters(config.model.lora.r) for p in PARTS for s in cut.sites[p])
    weights = sum(a.size for a in world.backbone.arrays.values() if a.dtype.kind == "f")
    naive = statistics.fmean(
        count_naive(config.model_copy(update={"seed": seed}), world) for seed in seeds
    )
    sizes = {"naive split": (naive, PLAIN)}
    sizes |= {name: (statistics.fmean(r["bytes"] for r in found[name]), name) for name in ARMS}
    sizes |= {name: (found[name][0]["bytes"], name) for name, arm in ARMS.items() if arm.like}
    sizes |= {
        "LoRA FedAvg": (2.0 * 4 * adapters, PLAIN),
        FULL: (2.0 * 4 * weights, FULL),
    }
    rows = {}
    for name, (size, of) in sizes.items():
        values = [row["ndcg@10"] for row in found[of]]
        plain = [row["ndcg@10"] for row in found[PLAIN]]
        rows[name] = {
            "bytes": size,
            "naive_over": naive / size,
            "over_full_model": size / (2.0 * 4 * weights),
            "ndcg@10": values,
            "ndcg@10_of": of,
            "change": statistics.fmean(values) / statistics.fmean(plain) - 1,
            "by_kind": found[name][0].get("by_kind", {}) if name in found else {},
        }
    return {"seeds": list(seeds), "config": config.model_dump(mode="json"), "rows": rows}


def show(results: Mapping[str, Any]) -> None:
    """The table."""
    table = Table(
        "one client, one round",
        "MB",
        "naive / it",
        "it / full model",
        "test NDCG@10",
        "change",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name, row in results["rows"].items():
        values = row["ndcg@10"]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.3f}",
            f"{row['naive_over']:.1f}",
            f"{row['over_full_model']:.4f}",
            f"{statistics.fmean(values):.4f}{spread}",
            f"{row['change']:+.2%}",
        )
    console.print(table)
    train, users = results["config"]["train"], results["config"]["evaluation"]["max_users"]
    console.print(
        f"{train['local_samples']} histories per client and round, {train['rounds']} rounds, seeds "
        f"{', '.join(map(str, results['seeds']))}; MB without evaluations. Change: of the mean "
        f"NDCG@10 against {PLAIN}, with which the naive split and LoRA FedAvg agree bit for bit. "
        f"Untrained: {results['untrained']:.4f}. Tested on "
        f"{'all users' if users is None else f'{users} users of each client'}."
    )


def _read(log: Path | None) -> dict[str, dict[str, Any]]:
    if log is None or not log.exists():
        return {}
    return dict(json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """`python -m fellray.jobs.bytes CONFIG [key=value ...]`: prints the table and writes
    `runs/bytes.json`. Trainings that a broken-off command left in `runs/bytes.log` count."""
    path, *overrides = sys.argv[1:] or ["jobs/demo.yaml"]
    config = configs.load(path, [*BUDGET, *overrides])
    torch.set_num_threads(config.clients.threads)
    warnings.simplefilter("ignore", FutureWarning)
    out = Path("runs")
    out.mkdir(exist_ok=True)
    before = load_average()
    results = measure(config, SEEDS, out / "bytes.log")
    results |= {"load_average": [before, load_average()]}
    show(results)
    Journal(Storage(out)).write_json("bytes.json", results)
    console.print(f"Written: {out}/bytes.json")


if __name__ == "__main__":
    main()
