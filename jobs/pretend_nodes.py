"""A cluster on one machine: a head, and nodes that Ray's autoscaler brings and takes away again.

The nodes are pretended: processes of this machine with resources of their own, placed, filled and
ended as real ones are. So it can be tried what becomes of a training when nodes come and go, and
not how fast many machines are. It knows nothing of training.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fellray.actors.session import ask_for_token, ray
from fellray.jobs.ports import find_ports
from fellray.jobs.process_tree import list_tree
from fellray.platform.errors import FellrayError

KIND = "client"
"""Node type of the pretended nodes, as in cluster.yaml."""
IDLE_S = 6.0
"""After so long without an actor a node is taken away."""
SILENT_S = 6.0
"""After so long without a sign of life the autoscaler replaces a node."""
_STORE = 200 << 20
"""Bytes of a node's object store."""


@dataclass
class PretendCluster:
    """A head that runs, and every process that came from it."""

    address: str
    _head: "subprocess.Popen[bytes]"
    _seen: dict[int, str] = field(default_factory=dict)

    def lose_node(self) -> str:
        """End one pretended node at once, as a cloud takes back a spot machine; its id.

        Raises:
            FellrayError: there is none.
        """
        self.look()
        named = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for process in self._seen:
            words = _command(process).split("\0")
            node = next((w.removeprefix("--node_id=") for w in words if "--node_id=" in w), "")
            if Path(words[0]).name == "raylet" and node in named and "--head" not in words:
                os.kill(process, signal.SIGKILL)
                return node
        raise FellrayError("no pretended node is there to be lost")

    def look(self) -> None:
        """Remember the processes that came from the head, also from those that died since."""
        self._seen = {p: begun for p, begun in self._seen.items() if _begun(p) == begun}
        for root in [self._head.pid, *self._seen]:
            for process in list_tree(root):
                if begun := _begun(process):
                    self._seen.setdefault(process, begun)

    def end(self) -> None:
        """End them all, by process id."""
        self.look()
        self._head.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._head.wait(10)
        # what a process started while it was ending is seen in the next turn
        for _ in range(3):
            self.look()
            for process in self._seen:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.2)
        self._head.wait()


@contextmanager
def pretend_nodes(most: int, cpus: int, head_cpus: int) -> Iterator[PretendCluster]:
    """A head without nodes; up to `most` nodes of so many CPUs come when actors wait for them.

    CPUs are whole numbers, and no floats: Ray 2.60 starts no node for "2.0" of them.

    Raises:
        FellrayError: Ray does not start.
    """
    ask_for_token()
    # sockets lie in it, and the path of a socket has at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="fellray-"))
    port, client_port, agent_port = find_ports(3)
    scaling = folder / "autoscaler.json"
    scaling.write_text(json.dumps(_scaling(most, cpus, f"127.0.0.1:{port}")), "utf-8")
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *(f"--num-cpus={head_cpus}", f"--object-store-memory={_STORE}"),
                *("--node-ip-address=127.0.0.1", "--include-dashboard=false"),
                *(f"--port={port}", f"--ray-client-server-port={client_port}"),
                *(f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats"),
                *("--min-worker-port=0", "--max-worker-port=0"),
                *(f"--temp-dir={folder}", f"--autoscaling-config={scaling}"),
            ],
            env=_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    cluster = PretendCluster(f"127.0.0.1:{port}", head)
    # a service manager's way to say Ctrl-C; unheard, it would leave a whole cluster behind
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _await(head, port, log)
        yield cluster
    finally:
        cluster.end()
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)


def _scaling(most: int, cpus: int, address: str) -> Mapping[str, object]:
    """What Ray's autoscaler is told; the empty entries are asked for by its schema."""
    lists = (
        *("setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"),
        *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
    )
    tables = ("head_node", "worker_nodes", "auth", "docker", "file_mounts")
    node = {
        "resources": {"CPU": cpus, "object_store_memory": _STORE},
        "labels": {"fellray": KIND},
        "node_config": {},
        "min_workers": 0,
        "max_workers": most,
    }
    return {
        "cluster_name": "fellray-pretended",
        "max_workers": most,
        "upscaling_speed": most,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
            "worker_liveness_check": True,
            # without it every new node stays "uninitialized" for ever
            "use_node_id_as_ip": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            KIND: node,
        },
        "head_node_type": "ray.head.default",
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
        **{name: {} for name in tables},
    }


def _environment() -> dict[str, str]:
    """Ours, with what Ray's autoscaler reads at its start."""
    ours = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_HEARTBEAT_TIMEOUT_S": f"{SILENT_S:g}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | ours


def _await(head: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and head.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    said = log.read_text("utf-8", errors="replace").strip().splitlines()[-5:]
    raise FellrayError("a Ray of pretended nodes did not start: " + " | ".join(said))


def _begun(process: int) -> str:
    """When it began: with its id, this names a process for ever. Empty where it is gone."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text("ascii", errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text("utf-8", errors="replace")
    except OSError:
        return ""
