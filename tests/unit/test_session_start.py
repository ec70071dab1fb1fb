"""A Ray that does not start in time is tried again; what it left is ended."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from fellray.actors import session
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError

LATE = "The current node timed out during startup. This could happen because ..."


def slow(starts: int, why: str = LATE) -> tuple[Callable[..., None], list[subprocess.Popen[bytes]]]:
    """A `ray.init` that starts a process, and only the last of so many times in time."""
    begun: list[subprocess.Popen[bytes]] = []

    def init(**settings: object) -> None:
        assert settings["address"] == "local"
        begun.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(begun) < starts:
            raise Exception(why)

    return init, begun


def start(monkeypatch: pytest.MonkeyPatch, init: Callable[..., None]) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    with session.connect(RunConfig(), 1):
        pass


def end(begun: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """How each ended before this looked; None: it had not."""
    found = []
    for process in begun:
        try:
            found.append(process.wait(5 if process is not begun[-1] else 0.1))
        except subprocess.TimeoutExpired:
            found.append(None)
            process.kill()
            process.wait()
    return found


def test_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    init, begun = slow(3)
    start(monkeypatch, init)
    assert end(begun) == [-9, -9, None]


def test_in_the_end_a_person_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    init, begun = slow(99)
    with pytest.raises(FellrayError, match="Ray did not start in 3 tries"):
        start(monkeypatch, init)
    assert len(begun) == 3
    assert None not in end(begun[:-1])
    end(begun[-1:])


def test_another_failure_is_ray_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    init, begun = slow(99, "no such address")
    with pytest.raises(Exception, match="no such address"):
        start(monkeypatch, init)
    assert end(begun) == [None]
