"""What a replica counts of itself, as text that Prometheus reads.

It must not know what a request means. Every replica counts its own: sums are the reader's.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper ends of the latency histogram's bins, seconds."""
WINDOW_S = 60.0
"""How far back `Counters.recent` looks."""
_REMEMBERED = 2**14
"""Requests at most that it looks back on."""


@dataclass(frozen=True)
class Recent:
    """What was answered lately."""

    window_s: float
    requests: int
    p50_s: float | None
    p99_s: float | None
    """The least time that no more than one in a hundred exceeded; None: no requests."""


class Counters:
    """Requests by route and status, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._bins = [0] * (len(BOUNDS_S) + 1)
        self._seconds = 0.0
        self._since = time.monotonic()
        self._recent: deque[tuple[float, str, float]] = deque(maxlen=_REMEMBERED)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request that was answered."""
        with self._lock:
            self._requests[method, route, status] += 1
            self._bins[bisect_left(BOUNDS_S, seconds)] += 1
            self._seconds += seconds
            self._recent.append((time.monotonic(), route, seconds))

    def recent(self, prefix: str, now: float | None = None) -> Recent:
        """Of the last `WINDOW_S` seconds, the requests whose route begins so.

        The window is shorter where less is remembered.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            held = list(self._recent)
        whole = len(held) < _REMEMBERED
        start = max(now - WINDOW_S, self._since if whole else held[0][0])
        took = sorted(s for at, route, s in held if at >= start and route.startswith(prefix))
        window_s = max(now - start, 1e-3)
        if not took:
            return Recent(window_s, 0, None, None)
        at = [took[-(-len(took) * share // 100) - 1] for share in (50, 99)]
        return Recent(window_s, len(took), *at)

    def render(
        self,
        gauges: Mapping[str, float],
        labels: Mapping[str, str],
        totals: Mapping[str, float] = MappingProxyType({}),
    ) -> str:
        """The exposition format, version 0.0.4.

        Args:
            gauges: further values by name.
            totals: further counts by name.
            labels: on every line; neither quotes nor backslashes in them.
        """
        own = "".join(f',{name}="{value}"' for name, value in labels.items())
        with self._lock:
            requests, bins, seconds = dict(self._requests), list(self._bins), self._seconds
        lines = ["# TYPE fellray_serve_requests_total counter"]
        for (method, route, status), count in sorted(requests.items()):
            where = f'method="{method}",route="{route}",status="{status}"{own}'
            lines.append(f"fellray_serve_requests_total{{{where}}} {count}")
        lines.append("# TYPE fellray_serve_request_seconds histogram")
        total = 0
        for bound, count in zip([*map(str, BOUNDS_S), "+Inf"], bins, strict=True):
            total += count
            lines.append(f'fellray_serve_request_seconds_bucket{{le="{bound}"{own}}} {total}')
        plain = f"{{{own[1:]}}}" if own else ""
        lines.append(f"fellray_serve_request_seconds_sum{plain} {seconds:.6f}")
        lines.append(f"fellray_serve_request_seconds_count{plain} {total}")
        for name, value in sorted(gauges.items()):
            lines += [f"# TYPE fellray_serve_{name} gauge", f"fellray_serve_{name}{plain} {value}"]
        for name, value in sorted(totals.items()):
            name = f"fellray_serve_{name}_total"
            lines += [f"# TYPE {name} counter", f"{name}{plain} {value}"]
        return "\n".join(lines) + "\n"
