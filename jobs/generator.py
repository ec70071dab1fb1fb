"""The generator: a process that asks, so that its CPU-seconds are not the service's.

It is told what to do line by line on its standard input, and answers the same way. It must not know
what serves.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import uvloop

from fellray.jobs.arrivals import draw_times
from fellray.jobs.load import run_closed, run_open
from fellray.jobs.tally import OK, Tally
from fellray.jobs.wire import Target
from fellray.platform.errors import FellrayError


@dataclass(frozen=True)
class Question:
    """One request."""

    method: str
    path: str
    body: dict[str, Any] | None = None


def ask_for(client: str, user: int) -> Question:
    """Recommendations for one user."""
    return Question("POST", "/v1/recommend", {"client": client, "user_id": user})


@dataclass(frozen=True)
class Load:
    """How it is asked: `rate` for an open loop, else `connections` for a closed one."""

    order: Sequence[int]
    """Places of the questions, one after the other; a closed loop begins again at its end."""
    seconds: float
    rate: float | None = None
    connections: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """A load that is over."""

    tally: Tally
    latency_s: np.ndarray
    """Of those that were answered, float64, as they came."""


class Generator:
    """Asks from a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "fellray.jobs.generator"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def process(self) -> int:
        """Its id."""
        return self._process.pid

    def ask(self, target: Target, questions: Sequence[Question], load: Load) -> Answered:
        """Ask so, and wait until it is over.

        Raises:
            FellrayError: the process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"order": [int(place) for place in load.order]}
        told = {
            "target": asdict(target),
            "questions": [asdict(question) for question in questions],
            "load": asdict(load) | order,
        }
        try:
            self._process.stdin.write(json.dumps(told) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise FellrayError("the load generator ended before its time")
        answer = json.loads(line)
        return Answered(Tally(**answer["tally"]), np.array(answer["latency_s"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


async def _run(told: dict[str, Any]) -> str:
    target, load = Target(**told["target"]), Load(**told["load"])
    requests = [
        target.write_request(
            one["method"],
            one["path"],
            None if one["body"] is None else json.dumps(one["body"]).encode(),
        )
        for one in told["questions"]
    ]
    order = np.array(load.order, np.int64)
    if load.rate is None:
        fates, tally = await run_closed(target, requests, order, load.connections, load.seconds)
    else:
        times = draw_times(load.rate, load.seconds, load.seed)
        order = np.resize(order, len(times))
        fates, tally = await run_open(target, requests, order, times)
    good = [s for s, fate in zip(fates.latency_s, fates.fates, strict=True) if fate == OK]
    return json.dumps({"tally": asdict(tally), "latency_s": good})


def main() -> None:
    """A line in, a line out, until the end of the input."""
    for line in sys.stdin:
        print(uvloop.run(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
