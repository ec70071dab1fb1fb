"""Rivals: the same FedAvg training by other frameworks and by ours, each in its own processes.

    python -m fellray.jobs.rivals FOLDER --flower-python PATH [--pfl-python PATH]
        [--users 50] [--per-round 50] [key=value ...]

PATH is the interpreter of an environment of that rival's own:

    python3 -m venv ENV; ENV/bin/pip install 'flwr[simulation]==1.41' torch==2.13.0 safetensors
    python3 -m venv ENV; ENV/bin/pip install pfl==0.6.0 torch==2.13.0 safetensors

Every arm gets the same clients, rows, start weights and optimizer as files (`rival_job.py`) and two
cores; what it trained is ranked by one code for all. Data and model are made in FOLDER, which is
kept.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from safetensors.numpy import load_file

from fellray.actors.world import survey
from fellray.jobs.display import console
from fellray.jobs.prepare import prepare
from fellray.jobs.process_tree import Watch
from fellray.jobs.rival_job import export_rival_job, rank
from fellray.jobs.timings import BUSY, load_average, spread
from fellray.jobs.tiny_encoder import make_encoder
from fellray.platform import config as configs
from fellray.platform import demo
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.journal import Journal
from fellray.platform.storage import Storage

CORES = 2
"""What all processes of an arm share."""
OURS = "ours"
"""Our arm's name."""
HERE = Path(__file__).parent


def make_job(
    folder: Path,
    users: int,
    per_round: int,
    blocks: int,
    width: int,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Demo data with a client per user, a small encoder, and the job in `folder`/job.

    Args:
        users: clients there are; per_round: clients that train in a round.
        overrides: `key=value` for our config, as `fellray train` takes them.
    """
    tree = {
        "name": "rivals",
        "storage": str(folder / "runs"),
        "data": {
            "path": str(folder / "data"),
            "k_core": 1,
            "max_users": users,
            "partition": {"kind": "per_user"},
        },
        "model": {"name": str(folder / "encoder")},
        "method": {"kind": "fedavg"},
        "train": {"rounds": 5, "local_samples": 16, "batch_size": 8},
        "sampling": {"per_round": per_round},
        "clients": {"per_actor": -(-users // CORES), "slots": per_round},
        "server": {"threads": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    stated = folder / "rivals.yaml"
    stated.write_text(json.dumps(tree), "utf-8")  # JSON is YAML
    config = configs.load(stated, overrides)
    _, items = demo.make(config.data.seed)
    tokens = config.model.max_tokens
    make_encoder(folder / "encoder", items["title"].to_pylist(), blocks, width, tokens, seed=0)
    prepare(config)
    export_rival_job(config, folder / "job", CORES)
    return config


def run_arm(name: str, command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run one framework's script on the job and add what its processes weighed and used.

    A script writes each client's loss in each round, and `stamps`: readings of `perf_counter`,
    which all processes of a machine share, when round 1 began and when each round ended.

    Raises:
        FellrayError: the script failed; its output lies beside the job.
    """
    log = folder / f"{name}.log"
    result = folder / f"{name}.json"
    for stale in (result, result.with_suffix(".safetensors")):
        stale.unlink(missing_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if name == OURS:
        env = dict(os.environ)  # this copy of fellray, which a rival must not find
    env |= {
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(folder / "flwr"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    before = load_average()
    with (
        log.open("w") as output,
        subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT) as process,
        Watch(process.pid) as watch,
    ):
        code = process.wait()
    if code or not result.exists():
        raise FellrayError(f"{name}: {' '.join(command)} ended with {code}; see {log}")
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    stamps = found["stamps"]
    later = stamps[1:] if len(stamps) > 2 else stamps
    return found | {
        "later_cpu_s": watch.cpu_between(later[0], later[-1]) / (len(later) - 1),
        "peak_pss_bytes": watch.peak_bytes,
        "processes": watch.processes,
        "load_average": [before, load_average()],
    }


def commands(job: Path, pythons: Mapping[str, Path]) -> dict[str, list[str]]:
    """What runs each arm: ours, and a rival for each interpreter given."""
    arms = {OURS: [sys.executable, "-m", "fellray.jobs.our_fedavg", str(job)]}
    if "flower" in pythons:
        arms["flower"] = [str(pythons["flower"]), str(HERE / "flower_fedavg.py"), str(job)]
    if "pfl" in pythons:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(CORES)]
        arms["pfl"] = [str(pythons["pfl"]), *launch, str(HERE / "pfl_fedavg.py"), str(job)]
    return arms


def summarize(found: Mapping[str, Any], rounds: int, ndcg: float) -> dict[str, Any]:
    """One arm's figures. Round 1 has each worker's start in it and is told apart."""
    losses = found["losses"]
    seconds = np.diff(found["stamps"]).tolist()
    later = spread(seconds[1:] or seconds)
    return {
        "rounds": len(seconds),
        "first_round_s": seconds[0],
        "round_s": later.median,
        "round_s_range": [later.low, later.high],
        "updates_per_s": len(losses[-1]) / later.median,
        "cpu_ms_per_update": 1e3 * found["later_cpu_s"] / len(losses[-1]),
        "peak_pss_mib": found["peak_pss_bytes"] / 2**20,
        "processes": found["processes"],
        "load_average": found["load_average"],
        "busy": max(found["load_average"]) > BUSY,
        "last_loss": float(np.mean(list(losses[-1].values()))) if len(losses) == rounds else None,
        "ndcg@10": ndcg if len(losses) == rounds else None,
    }


def compare_losses(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Largest difference of any client's mean training loss, in round 1 and in any shared round."""
    gaps = []
    for a, b in zip(ours["losses"], theirs["losses"], strict=False):
        assert a.keys() == b.keys(), "the arms trained other clients"
        gaps.append(max(abs(loss - b[client]) for client, loss in a.items()))
    return {"round_1": gaps[0], "any_round": max(gaps), "rounds": len(gaps)}


def compare(config: RunConfig, job: Path, arms: Mapping[str, Any]) -> dict[str, Any]:
    """All figures, and how far each rival's numbers lie from ours."""
    world = survey(config)

    def ndcg(name: str) -> float:
        theta_P = torch.from_numpy(load_file(job / f"{name}.safetensors")["theta_P"])
        scores = list(rank(config, world, theta_P).values())
        return sum(scores[1:], scores[0]).means()["ndcg@10"]

    figures = {
        name: summarize(found, config.train.rounds, ndcg(name)) for name, found in arms.items()
    }
    gaps = {n: compare_losses(arms[OURS], found) for n, found in arms.items() if n != OURS}
    return {"arms": figures, "loss_gaps": gaps, "start_ndcg@10": ndcg("start"), "cores": CORES}


def show(results: Mapping[str, Any]) -> None:
    """A table of the arms, then the differences."""
    columns = ("arm", "round s", "first s", "updates/s", "CPU ms each", "MiB", "loss", "NDCG@10")
    table = Table(*columns, box=box.SIMPLE)
    for name, arm in results["arms"].items():
        known = arm["last_loss"] is not None
        table.add_row(
            f"{name}{' (busy)' if arm['busy'] else ''}",
            f"{arm['round_s']:.2f}",
            f"{arm['first_round_s']:.2f}",
            f"{arm['updates_per_s']:.1f}",
            f"{arm['cpu_ms_per_update']:.0f}",
            f"{arm['peak_pss_mib']:.0f}",
            f"{arm['last_loss']:.5f}" if known else "",
            f"{arm['ndcg@10']:.5f}" if known else "",
        )
    console.print(table)
    for name, gap in results["loss_gaps"].items():
        console.print(
            f"{name}: a client's loss differs from ours by at most {gap['round_1']:.1e} in round "
            f"1, {gap['any_round']:.1e} in {gap['rounds']} rounds"
        )
    console.print(f"NDCG@10 before training: {results['start_ndcg@10']:.5f}")


def main() -> None:
    """See above; writes FOLDER/rivals.json."""
    parser = argparse.ArgumentParser(prog="fellray.jobs.rivals")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flower-python", type=Path)
    parser.add_argument("--pfl-python", type=Path)
    for name, default in (("users", 50), ("per-round", 50), ("blocks", 4), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    told = parser.parse_intermixed_args()
    folder = told.folder.absolute()
    pythons = {
        name: path.absolute()
        for name, path in (("flower", told.flower_python), ("pfl", told.pfl_python))
        if path
    }
    # every process of an arm inherits it
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(1)
    config = make_job(folder, told.users, told.per_round, told.blocks, told.width, told.overrides)
    job = folder / "job"
    arms = {}
    for name, command in commands(job, pythons).items():
        arms[name] = run_arm(name, command, job)
        console.print(f"{name}: done")
    results = compare(config, job, arms)
    show(results)
    Journal(Storage(folder)).write_json("rivals.json", results)


if __name__ == "__main__":
    main()
