"""Contrast: an arm against another over the same seeds and clients.

Clients, not pairs of a client and a seed, are what a result generalises over: all seeds share a
client's users and held-out items, so they are averaged first. It must not know studies or pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from fellray.platform.paired import adjust, lowest_p, weigh_signs
from fellray.platform.study_values import read_values

Runs = Sequence[Mapping[str, Any]]
"""Summaries of one arm, one per seed, in one order for all arms."""


@dataclass(frozen=True)
class Contrast:
    """What sets an arm apart from the first."""

    difference: float
    """Of the means over seeds, as tables show them: users count alike."""
    seeds: tuple[int, int]
    """In how many seeds the arm is above, of how many."""
    clients: tuple[int, int]
    """At how many clients it is above in the mean over seeds, of how many; 0, 0 where runs tell no
    client's value."""
    p: float
    """Of that difference under random signs of the clients' (where there are none: the seeds')
    parts of it."""
    lowest: float
    """What p cannot be below with so many of them."""

    @property
    def told(self) -> str:
        """How consistent it is, in words of a table."""
        of_clients = f", {self.clients[0]}/{self.clients[1]} clients" if self.clients[1] else ""
        return f"{self.seeds[0]}/{self.seeds[1]} seeds{of_clients}"


def contrast(first: Runs, others: Mapping[str, Runs], metric: str) -> dict[str, Contrast]:
    """Every other arm against the first, p adjusted for their number (Holm)."""
    found = {arm: _compare(first, runs, metric) for arm, runs in others.items()}
    adjusted = adjust([one.p for one in found.values()])
    return {arm: replace(one, p=p) for (arm, one), p in zip(found.items(), adjusted, strict=True)}


def _compare(first: Runs, runs: Runs, metric: str) -> Contrast:
    pairs = list(zip(read_values(first, metric), read_values(runs, metric), strict=True))
    by_seed = [theirs - own for own, theirs in pairs]
    by_client, share = _by_client(first, runs, metric)
    parts = [a * b for a, b in zip(by_client, share, strict=True)] or by_seed
    return Contrast(
        difference=fmean(by_seed),
        seeds=(sum(one > 0 for one in by_seed), len(by_seed)),
        clients=(sum(one > 0 for one in by_client), len(by_client)),
        p=weigh_signs(parts),
        lowest=lowest_p(len(parts)),
    )


def _by_client(first: Runs, runs: Runs, metric: str) -> tuple[list[float], list[float]]:
    """Each client's difference in the mean over seeds, and its share of the users."""
    if not all(one.get("per_client") for one in (*first, *runs)):
        return [], []
    clients = sorted(c for c, own in first[0]["per_client"].items() if metric in own)
    mean = {
        side: [fmean(one["per_client"][c][metric] for one in ones) for c in clients]
        for side, ones in (("first", first), ("other", runs))
    }
    users = [float(first[0]["per_client"][c]["users"]) for c in clients]
    differences = [b - a for a, b in zip(mean["first"], mean["other"], strict=True)]
    return differences, [count / sum(users) for count in users]
