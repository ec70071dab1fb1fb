"""A service that is measured: a process with a Ray of its own, which listens on this machine.

It knows how to begin and end one, and what CPU it used; not what it is asked.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fellray.jobs.front import SWITCH
from fellray.jobs.ports import find_ports
from fellray.jobs.process_tree import list_tree, read_cpu
from fellray.jobs.wire import Target
from fellray.platform.errors import FellrayError
from fellray.platform.storage import Storage
from fellray.serve.tokens import new_token

START_S = 300.0
END_S = 90.0
SERVED = "is served at"
"""What it says when it answers."""


@dataclass(frozen=True)
class Service:
    """One that is up."""

    target: Target
    process: int
    """Everything of it comes from this one."""

    def cpu(self) -> float:
        """CPU-seconds of all its processes so far."""
        used = (read_cpu(process) for process in list_tree(self.process))
        return sum(seconds for seconds in used if seconds is not None)


@dataclass
class Starting:
    """One that is coming up."""

    child: "subprocess.Popen[bytes]"
    target: Target
    log: Path

    def wait(self) -> Service:
        """Until it answers.

        Raises:
            FellrayError: it does not, and what it said.
        """
        deadline = time.monotonic() + START_S
        while SERVED not in (said := self.log.read_text(errors="replace")):
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise FellrayError(f"a service did not start: {said[-2000:]}")
            time.sleep(0.1)
        return Service(self.target, self.child.pid)

    def end(self) -> None:
        """As a service manager does, and what is left after that for good."""
        tree = list_tree(self.child.pid)
        self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(END_S)
        except subprocess.TimeoutExpired:
            for process in tree:
                _kill(process)
            self.child.wait()


@contextmanager
def start_run(run: str, settings: Sequence[str]) -> Iterator[Starting]:
    """`fellray serve` of a run, with a token of its own that the run's folder never sees.

    Args:
        settings: `key=value`.
    """
    with tempfile.TemporaryDirectory(prefix="fellray-bench-") as folder:
        token = new_token(Storage(folder), None)
        (port,) = find_ports(1)
        open_to_load = ["rate=1000000", "burst=1000000", f"tokens={folder}"]
        command = ["serve", run, "--port", str(port), *open_to_load, *settings]
        with _start(["fellray.jobs.cli", *command], {}, Path(folder), port, token) as starting:
            yield starting


@contextmanager
def start_stock() -> Iterator[Starting]:
    """See `jobs.stock`: Ray Serve as it is when nobody sets anything."""
    with tempfile.TemporaryDirectory(prefix="fellray-bench-") as folder:
        (port,) = find_ports(1)
        command = ["fellray.jobs.stock", str(port)]
        with _start(command, {SWITCH: "0"}, Path(folder), port, None) as starting:
            yield starting


@contextmanager
def _start(
    command: Sequence[str], env: dict[str, str], folder: Path, port: int, token: str | None
) -> Iterator[Starting]:
    # Ray's actors would step back behind whoever asks
    env = {**os.environ, "RAY_worker_niceness": "0", "CUDA_VISIBLE_DEVICES": "", **env}
    env.pop("RAY_ADDRESS", None)
    log = folder / "log"
    with log.open("wb") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=env,
            stdout=said,
            stderr=said,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    starting = Starting(child, Target("127.0.0.1", port, token), log)
    try:
        yield starting
    finally:
        starting.end()


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
