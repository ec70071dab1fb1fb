"""One Ray for all tests that can share it, and drivers in process groups of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from fellray.actors.session import connect
from fellray.platform import config as configs
from fellray.platform.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
OURS = ("RAY_", "MASTER_", "DS_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_")
"""What this process's own Ray and DeepSpeed put into the environment."""


@pytest.fixture(autouse=True)
def _no_cluster_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="session")
def local_ray(tiny_config: Callable[..., RunConfig]) -> Iterator[None]:
    """A Ray with room for five client actors and a server; `connect` in a test joins it."""
    with connect(tiny_config(), actors=8):
        yield


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[[RunConfig], str]:
    """Writes a config and says where."""

    def write(config: RunConfig) -> str:
        path = tmp_path / f"{config.name}.yaml"
        path.write_text(configs.dump(config))
        return str(path)

    return write


def wait_until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer of `holds`."""
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)
    return answer


def plain_environment() -> dict[str, str]:
    """A user's shell: without what this process's own Ray left in the environment."""
    return {k: v for k, v in os.environ.items() if not k.startswith(OURS)}


class Driver:
    """A command in a process group of its own, and every process that came from it."""

    def __init__(self, command: list[str], env: Mapping[str, str], log: Path):
        self._streams = [log.with_suffix(".out"), log.with_suffix(".err")]
        with ExitStack() as opened:
            # files, not pipes: whoever outlives the driver would hold a pipe open
            out, err = (opened.enter_context(stream.open("w")) for stream in self._streams)
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=dict(env), stdout=out, stderr=err, start_new_session=True
            )
        self._seen: set[psutil.Process] = set()

    def look(self) -> list[psutil.Process]:
        """Living descendants, also of those that died; whoever was seen is remembered."""
        for parent in [psutil.Process(self.process.pid), *self._seen]:
            with suppress(psutil.NoSuchProcess):
                self._seen |= set(parent.children(recursive=True))
        return [p for p in self._seen if _alive(p)]

    def actors(self, name: str) -> list[psutil.Process]:
        """Living actors of a class, by the title that Ray gives their processes."""
        found = [p for p in self.look() if title(p).startswith(f"ray::{name}")]
        return sorted(found, key=lambda p: p.pid)

    def running(self) -> bool:
        """The driver itself."""
        return self.process.poll() is None

    def finish(self, seconds: float = 240.0) -> tuple[int, str, str]:
        """Wait for the end: exit status, stdout, stderr."""

        def ended() -> bool:
            self.look()
            return not self.running()

        wait_until(ended, seconds, "the driver ends")
        out, err = (stream.read_text() for stream in self._streams)
        return self.process.returncode, out, err

    def left(self, seconds: float = 30.0) -> list[str]:
        """Titles of processes that have not ended by themselves in this time."""
        deadline = time.monotonic() + seconds
        while (found := self.look()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"{p.pid} {title(p)}" for p in found]

    def end(self) -> None:
        """End it and what it left, by process id."""
        for process in [self.process, *self.look()]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self.process.wait()


Launch = Callable[..., Driver]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """`launch("-m", "fellray.jobs.cli", "train", config)`: Python with these arguments."""
    with ExitStack() as started:

        def start(*arguments: str, env: Mapping[str, str] | None = None) -> Driver:
            log = tmp_path / f"driver-{time.monotonic_ns()}"
            driver = Driver([sys.executable, *arguments], env or plain_environment(), log)
            started.callback(driver.end)
            return driver

        yield start


def title(process: psutil.Process) -> str:
    """What `ps` shows."""
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        return ""


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
