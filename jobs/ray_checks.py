"""Checks of Ray's surroundings: its token, its address, and what it takes of a machine.

As in `checks`, a check looks at what it is given. Nothing here imports Ray, which reads its
environment once and for all. Sizes are in bytes.
"""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from fellray.jobs.checks import Finding
from fellray.platform.config import RunConfig

RAY_NICENESS = 15
"""What Ray adds to its workers' nice value unless told otherwise."""
SHARE_OF_STORE = 0.3
"""Share of memory that Ray gives its object store."""
STORE_FLOOR = 10**10
"""Below this Ray does not make its object store smaller to fit /dev/shm."""


def check_token(environ: Mapping[str, str], config: RunConfig, home: Path) -> Finding:
    """Whether Ray asks for a token, and finds one where it must bring one.

    Ray takes RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token. A misspelt
    mode means none: Ray 2.60 reads `tokn` as disabled.
    """
    name = "Ray's token"
    mode = environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        found = f"RAY_AUTH_MODE={mode}: whoever reaches Ray's ports can run code as this user"
        return Finding(name, "warning", found, "export RAY_AUTH_MODE=token")
    address = environ.get("RAY_ADDRESS")
    if (address or config.cluster.address) == "local":
        if address == "":
            found = "RAY_ADDRESS is set but empty: then fellray does not switch the token on"
            return Finding(name, "warning", found, "unset RAY_ADDRESS")
        return Finding(name, "ok", "a Ray of its own gets a token of its own")
    if mode is None and address is not None:
        found = "RAY_AUTH_MODE is not set, but `ray start` asks for a token: Unauthorized"
        return Finding(name, "warning", found, "export RAY_AUTH_MODE=token")
    file = Path(environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    if environ.get("RAY_AUTH_TOKEN"):
        return Finding(name, "ok", "in RAY_AUTH_TOKEN")
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not token:
        way_out = "copy the head node's ~/.ray/auth_token there, or export RAY_AUTH_TOKEN"
        return Finding(name, "broken", f"no token in RAY_AUTH_TOKEN nor in {file}", way_out)
    return Finding(name, "ok", f"in {file}")


def check_address(environ: Mapping[str, str], config: RunConfig, wait_s: float = 3.0) -> Finding:
    """Whether RAY_ADDRESS leads anywhere, and whether that is where the config wants to go."""
    name, address = "RAY_ADDRESS", environ.get("RAY_ADDRESS", "")
    if not address:
        return Finding(name, "ok", f"not set; cluster.address={config.cluster.address}")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in environ:
        return Finding(name, "ok", f"{address}, set by the job")
    if address.startswith(("http://", "https://")):
        found = f"{address} is where jobs are submitted; ray.init() refuses it"
        return Finding(name, "broken", found, "unset it, and give it to `ray job submit --address`")
    if address not in ("auto", "local"):
        place = urlsplit(address if "://" in address else f"ray://{address}")
        try:
            socket.create_connection((place.hostname or "", place.port or 0), wait_s).close()
        except (OSError, ValueError):
            return Finding(name, "broken", f"{address}: nobody answers there", "unset RAY_ADDRESS")
    if config.cluster.address == "local" and address != "local":
        found = f"{address} wins over cluster.address=local: training joins that cluster"
        return Finding(name, "warning", found, "unset RAY_ADDRESS, if that is not meant")
    return Finding(name, "ok", address)


def check_running(config: RunConfig, environ: Mapping[str, str], processes: Path) -> Finding:
    """Whether a Ray runs on this machine already. Args: processes: /proc."""
    name, running = "running Ray", []
    for entry in processes.glob("[0-9]*/cmdline"):
        try:
            program = entry.read_bytes().partition(b"\0")[0].decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if os.path.basename(program) in ("raylet", "gcs_server"):
            running.append(int(entry.parent.name))
    if running:
        found = f"{len(running)} processes of Ray run here (pid {min(running)} ...)"
        if config.cluster.address == "auto":
            return Finding(name, "ok", f"{found}; cluster.address=auto joins them")
        way_out = "a Ray of one's own shares cores and memory with it; `auto` would join it"
        return Finding(name, "warning", found, way_out)
    if config.cluster.address == "auto" and not environ.get("RAY_ADDRESS"):
        way_out = "start one, or set cluster.address=local"
        return Finding(name, "broken", "none, but cluster.address=auto wants to join one", way_out)
    return Finding(name, "ok", "none")


def check_shared_memory(free: int, memory: int) -> Finding:
    """Whether Ray's object store fits into shared memory.

    Args:
        free: of /dev/shm.
        memory: of the machine or container.
    """
    store = min(SHARE_OF_STORE * memory, max(STORE_FLOOR, 0.95 * free))
    found = f"{free / 2**30:.1f} GiB free, Ray's object store takes {store / 2**30:.1f} GiB"
    if store > free:
        way_out = f"docker run --shm-size={store * 1.1 / 2**30:.1f}gb; until then Ray uses /tmp"
        return Finding("/dev/shm", "warning", found, way_out)
    return Finding("/dev/shm", "ok", found)


def check_open_files(limits: tuple[int, int], actors: int | None) -> Finding:
    """Whether Ray's processes may open enough files: 64 and 2.25 more for an actor, as measured.

    Args:
        limits: soft and hard; Ray raises its own to 65,536 where it may.
    """
    soft, hard = (2**62 if limit < 0 else limit for limit in limits)
    allowed = max(soft, min(hard, 65536))
    need = 100 + 3 * (actors or 1)
    found = f"{allowed} may be open, about {need} are needed"
    if allowed < need:
        return Finding("open files", "broken", found, f"ulimit -n {max(8192, 2 * need)}")
    if allowed < 4096:
        return Finding("open files", "warning", found, "ulimit -n 8192, as Ray recommends")
    return Finding("open files", "ok", found)


def check_niceness(environ: Mapping[str, str], own: int, load: float, cores: int) -> Finding:
    """Whether actors get their turn: Ray's workers stand back behind everything else."""
    name, told = "niceness", environ.get("RAY_worker_niceness", str(RAY_NICENESS))
    if not told.isdecimal():
        found = f"RAY_worker_niceness={told} is no whole number of 0 or more"
        return Finding(name, "broken", found, "unset RAY_worker_niceness")
    nice = min(19, own + int(told))
    found = f"actors run at nice {nice}, load {load:.1f} on {cores} cores"
    if nice > own and load > cores / 2:
        way_out = "export RAY_worker_niceness=0, or end the other work"
        return Finding(name, "warning", f"{found}: other work goes first", way_out)
    return Finding(name, "ok", found)
