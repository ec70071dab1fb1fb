"""Doctor: what in the user's surroundings will go wrong, before it does.

It gathers what is there, hands it to the checks, and shows a table. It changes nothing.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fellray.jobs import checks, ray_checks
from fellray.jobs.checks import Finding
from fellray.platform.config import RunConfig
from fellray.platform.data_config import DirichletPartition, KMeansPartition
from fellray.platform.encoder import Backbone
from fellray.platform.errors import FellrayError
from fellray.platform.lanes import Lanes
from fellray.platform.model_config import LoraSpec, ModelConfig
from fellray.platform.packed import Batch
from fellray.platform.shards import Dataset
from fellray.platform.split import cut_model
from fellray.platform.trunk import Trunk

ENGINE_S = 180.0
"""How long DeepSpeed may take to start; it took 15 s on the machine it was measured on."""
COLOURS = {"ok": "green", "warning": "yellow", "broken": "red"}


def examine(config: RunConfig) -> list[Finding]:
    """All checks on this machine and in this environment."""
    environ, cores = os.environ, len(os.sched_getaffinity(0))
    clients = count_clients(config)
    auto = config.clients.per_actor == "auto"
    actors = None if clients is None or auto else -(-clients // config.clients.together)
    available, memory = read_memory(Path("/"))
    shared = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    try:
        requirements = requires("fellray") or []
    except PackageNotFoundError:  # run from its sources
        requirements = []
    return [
        checks.check_packages(requirements),
        checks.check_gpu(config, torch.version.cuda, torch.cuda.device_count(), Path("/dev")),
        checks.check_threads(environ, config, actors, cores),
        ray_checks.check_token(environ, config, Path.home()),
        ray_checks.check_address(environ, config),
        ray_checks.check_running(config, environ, Path("/proc")),
        checks.check_compiler(environ.get("PATH", "")),
        checks.check_encoder(config),
        checks.check_memory(config, clients, available),
        ray_checks.check_shared_memory(shared.f_bavail * shared.f_frsize if shared else 0, memory),
        ray_checks.check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE), actors),
        checks.check_disk(config, clients, Path(environ.get("RAY_TMPDIR", "/tmp"))),
        ray_checks.check_niceness(environ, os.nice(0), os.getloadavg()[0], cores),
        checks.check_storage(config),
        check_engine(config, environ),
    ]


def show_findings(findings: Sequence[Finding]) -> None:
    """The table, and what it comes to."""
    console = Console(highlight=False)
    table = Table("check", "", "found", "what to do")
    for one in findings:
        mark = Text(one.status, COLOURS[one.status])
        table.add_row(one.check, mark, Text(one.found), Text(one.way_out))
    console.print(table)
    count = {status: sum(one.status == status for one in findings) for status in COLOURS}
    console.print(f"{count['ok']} ok, {count['warning']} warnings, {count['broken']} broken")


def count_clients(config: RunConfig) -> int | None:
    """How many learners the run has; None where that is known after `fellray prepare` only."""
    partition = config.data.partition
    try:
        names = Dataset(config.data.path).clients
    except FellrayError:
        if not isinstance(partition, KMeansPartition | DirichletPartition):
            return None
        names = tuple(f"c{i}" for i in range(partition.num_clients))
    return len(config.method.seat(names))


def read_memory(root: Path) -> tuple[int, int]:
    """Bytes available and in all, of the machine or of the container if that has less.

    Args:
        root: /, under which are proc/meminfo and sys/fs/cgroup.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    meminfo = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    available, total = meminfo["MemAvailable"], meminfo["MemTotal"]
    group = root / "sys/fs/cgroup"
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = int((group / most).read_text())  # the word `max` means no limit
            rest = limit - int((group / used).read_text())
        except (OSError, ValueError):
            continue
        available, total = min(available, rest), min(total, limit)
    return available, total


def check_engine(
    config: RunConfig, environ: Mapping[str, str], limit_s: float = ENGINE_S
) -> Finding:
    """Whether DeepSpeed starts and takes a step, in a process of its own with a time limit."""
    name = "DeepSpeed"
    if config.server.engine != "deepspeed":
        return Finding(name, "ok", f"not used: server.engine={config.server.engine}")
    code = "from fellray.jobs.doctor import start_engine; start_engine()"
    way_out = "mend what it says, or set server.engine=torch"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "broken", f"has not started after {limit_s:g} s", way_out)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = said[-1].strip() if said else f"it ended with status {done.returncode}"
        return Finding(name, "broken", f"does not start: {reason[:300]}", way_out)
    return Finding(name, "ok", "starts, and takes a step on a tiny trunk")


def start_engine() -> None:
    """A real engine on a tiny trunk: forward, backward, one step. An exception says what failed."""
    from transformers import AutoConfig, AutoModel

    from fellray.actors.engine import DeepSpeedEngine

    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 8}
    tiny = AutoConfig.for_model("bert", num_attention_heads=2, **sizes)
    with torch.device("meta"):
        shapes = AutoModel.from_config(tiny, add_pooling_layer=False).state_dict()
    arrays = {n: np.full(tuple(t.shape), 0.1, np.float32) for n, t in shapes.items()}
    config = RunConfig(model=ModelConfig(cut=1, top=1, lora=LoraSpec(r=1)))
    parts = cut_model(Backbone("doctor", "", tiny.to_dict(), arrays), config.model)
    width = sum(site.num_parameters(1) for site in parts.cut.sites["trunk"])
    engine = DeepSpeedEngine(Trunk(parts.trunk, torch.zeros(width)), config)
    lanes = Lanes(torch.tensor([16]), torch.tensor([0]), 16, torch.tensor([1]))
    batch, ones = Batch(lanes, []), torch.ones(16, 16)
    _, saved = engine.module.packed.forward(ones, batch, keep=True)
    down = engine.backward(ones, saved, batch)
    engine.step_shared(torch.ones(width))
    values = engine.shared_state()["values"]
    if down.shape != ones.shape or not bool((values < 0).all()):
        raise FellrayError("DeepSpeed took a step, but the weights are not what they must be")
