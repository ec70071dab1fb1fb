"""A tally: what became of the requests of one load, in numbers.

It must not know where requests come from or go to.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OK = "ok"
"""What became of a request that was answered."""
SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Tally:
    """One load, from its first request to its last answer."""

    seconds: float
    """Between those."""
    sent: int
    answered: int
    errors: Mapping[str, int]
    """Kind -> how many."""
    throughput: float
    """Answers a second."""
    latency_ms: Mapping[str, float]
    """`p50`, `p90`, `p99`, `max` and `mean` of those that were answered; empty without any."""
    generator_cpu_s: float
    """CPU-seconds of the process that asked."""


def count_load(
    latency_s: Sequence[float], fates: Sequence[str], seconds: float, generator_cpu_s: float
) -> Tally:
    """Args: latency_s, fates: of each request, in any order."""
    good = sorted(s for s, fate in zip(latency_s, fates, strict=True) if fate == OK)
    errors = Counter(fate for fate in fates if fate != OK)
    latency = {f"p{share * 100:g}": find_quantile(good, share) * 1000 for share in SHARES if good}
    if good:
        latency |= {"max": good[-1] * 1000, "mean": math.fsum(good) / len(good) * 1000}
    return Tally(
        seconds,
        len(fates),
        len(good),
        dict(sorted(errors.items())),
        len(good) / seconds,
        latency,
        generator_cpu_s,
    )


def add_errors(so_far: dict[str, int], tally: Tally) -> None:
    """Count a load's errors in, kind by kind."""
    for kind, count in tally.errors.items():
        so_far[kind] = so_far.get(kind, 0) + count


def find_quantile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed (nearest rank)."""
    assert ascending
    assert 0 < share <= 1
    # 0.99 * 100 is more than 99 in floating point
    return ascending[max(0, math.ceil(round(share * len(ascending), 9)) - 1)]
