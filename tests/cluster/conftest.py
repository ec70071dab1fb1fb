"""One Ray for all tests that can share it, and drivers in processes of their own."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from driver import Driver

from fellray.actors.session import connect
from fellray.platform import config as configs
from fellray.platform.config import RunConfig


@pytest.fixture(autouse=True)
def _no_cluster_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="session")
def local_ray(tiny_config: Callable[..., RunConfig]) -> Iterator[None]:
    """A Ray with room for eight client actors and a server; `connect` in a test joins it.

    Its metrics endpoint is open, which one of our own choosing is not.
    """
    os.environ["RAY_enable_metrics_collection"] = "1"  # noqa: SIM112 - Ray spells it so
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


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """`launch("-m", "fellray.jobs.cli", "train", config)`: Python with these arguments."""
    with ExitStack() as started:

        def start(*arguments: str) -> Driver:
            driver = Driver.python(*arguments, log=tmp_path / f"driver-{time.monotonic_ns()}")
            started.callback(driver.end)
            return driver

        yield start
