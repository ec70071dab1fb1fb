"""Timings: arms taken in turn in one run, so that a ratio means something on a machine others use.

An arm is any call; what it does is not this file's business.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fellray.jobs.process_tree import list_tree, read_cpu

BUSY = 1.5
"""A load average above this marks a run: its wall-clock times are not to be quoted."""


@dataclass(frozen=True)
class Spread:
    """A median that says how far its values lay apart."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Taken:
    """Seconds of one arm, turn by turn."""

    wall: list[float]
    cpu: list[float]
    """Of this process and of those that it started, actors too; others' work is not in it."""


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest of one value or more."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratio turn by turn: what slowed the machine in a turn slowed both of its arms."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def interleave(arms: Mapping[str, Callable[[], object]], turns: int) -> dict[str, Taken]:
    """Every arm once without a clock, then `turns` times each, in turn.

    Every other turn goes backwards, so that no arm always follows the same one.
    """
    for arm in arms.values():
        arm()
    taken = {name: Taken([], []) for name in arms}
    order = list(arms)
    for _ in range(turns):
        for name in order:
            cpu, wall = _cpu(), time.perf_counter()
            arms[name]()
            taken[name].wall.append(time.perf_counter() - wall)
            taken[name].cpu.append(_cpu() - cpu)
        order.reverse()
    return taken


def load_average() -> float:
    """The machine's load over the last minute."""
    return os.getloadavg()[0]


def _cpu() -> float:
    """Seconds: this process's to the microsecond, the others' to Linux's ticks."""
    here = os.getpid()
    others = (read_cpu(process) for process in list_tree(here) if process != here)
    return time.process_time() + sum(used for used in others if used is not None)
