"""A command in a process group of its own, watched from outside with all that came from it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
OURS = ("RAY_", "MASTER_", "DS_", "DEEPSPEED_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_")
"""What this process's own Ray and DeepSpeed put into the environment."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray 2.60's agents, when their raylet was killed, first try for 60 s to report that to a GCS that
was killed too, and end then."""


def plain_environment() -> dict[str, str]:
    """A user's shell: without what this process's own Ray left in the environment."""
    return {k: v for k, v in os.environ.items() if not k.startswith(OURS)}


def wait_until(holds: Callable[[], Any], seconds: float, what: str, pause_s: float = 0.02) -> Any:
    """The first true answer of `holds`."""
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(pause_s)
    return answer


def title(process: psutil.Process) -> str:
    """What `ps` shows."""
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        return ""


def actors_below(parent: psutil.Process, name: str) -> list[psutil.Process]:
    """Living actors of a class, by the title that Ray gives their processes."""
    below = parent.children(recursive=True)
    return sorted((p for p in below if title(p).startswith(f"ray::{name}")), key=lambda p: p.pid)


class Driver:
    """A command in a process group of its own, and every process that came from it."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path):
        self._streams = [log.with_suffix(".out"), log.with_suffix(".err")]
        with ExitStack() as opened:
            # files, not pipes: whoever outlives the driver would hold a pipe open
            out, err = (opened.enter_context(stream.open("w")) for stream in self._streams)
            # a shell starts what is in its background deaf to Ctrl-C, and all that comes from it
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=dict(env), stdout=out, stderr=err, start_new_session=True
            )
            signal.signal(signal.SIGINT, before)
        self._seen: set[psutil.Process] = set()

    @classmethod
    def python(cls, *arguments: str, log: Path, env: Mapping[str, str] | None = None) -> "Driver":
        """This Python with these arguments."""
        return cls([sys.executable, *arguments], env or plain_environment(), log)

    def look(self) -> list[psutil.Process]:
        """Living descendants, also of those that died; whoever was seen is remembered."""
        children: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter(["ppid"]):
            children.setdefault(process.info["ppid"], []).append(process)
        found = [p.pid for p in self._seen if p.is_running()]
        if self.running():  # else its id may be somebody else's by now
            found.append(self.process.pid)
        for pid in found:
            fresh = [p for p in children.get(pid, ()) if p not in self._seen]
            self._seen |= set(fresh)
            found += [p.pid for p in fresh]
        return [p for p in self._seen if _alive(p)]

    def running(self) -> bool:
        """The command itself."""
        return self.process.poll() is None

    def text(self) -> tuple[str, str]:
        """Stdout and stderr so far."""
        out, err = (stream.read_text() for stream in self._streams)
        return out, err

    def finish(self, seconds: float = 240.0) -> tuple[int, str, str]:
        """Wait for the end: exit status, stdout, stderr."""

        def ended() -> bool:
            self.look()
            return not self.running()

        wait_until(ended, seconds, "the command ends", pause_s=0.2)
        return self.process.returncode, *self.text()

    def left(self, seconds: float = 30.0, but: tuple[str, ...] = ()) -> list[str]:
        """Titles of the processes that have not ended by themselves after this time.

        Those whose titles begin with one of `but` are not waited for.
        """
        deadline = time.monotonic() + seconds
        while True:
            titles = [f"{p.pid} {title(p).strip()}" for p in self.look()]
            found = [t for t in titles if not t.partition(" ")[2].startswith(but or "\0")]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.2)

    def end(self) -> None:
        """End it and what it left, by process id."""
        found = self.look()
        self.process.kill()
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
