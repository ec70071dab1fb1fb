"""The figures of a service under load that have a goal. It must not know how they were measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fellray.jobs.timings import ratios

HELD = 0.7
"""The share of saturation at which p99 has a goal."""


def judge(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ratios that have a goal, and whether they meet it."""
    arms, figures = results["arms"], []

    def add(
        name: str, over: Sequence[float], under: Sequence[float], goal: tuple[str, float]
    ) -> None:
        ratio = ratios(over, under)
        sign, bound = goal
        met = ratio.median >= bound if sign == ">=" else ratio.median <= bound
        figures.append({"name": name, "ratio": asdict(ratio), "goal": list(goal), "met": met})

    service, bare = arms["service"], arms["bare loop"]
    add("service / bare loop", service["throughput"], bare["throughput"], (">=", 0.6))
    without = [
        rate / (1 - share)
        for rate, share in zip(service["throughput"], service["generator_share"], strict=True)
    ]
    add("the same without the generator's CPU", without, bare["throughput"], (">=", 0.85))
    unbatched = arms["unbatched"]["throughput"]
    add("service / unbatched", service["throughput"], unbatched, (">=", 1.4))
    for name in ("stock no-op", "roomy stock no-op"):
        add(f"no-op / {name}", arms["no-op"]["throughput"], arms[name]["throughput"], (">=", 6.0))
    held = [row for row in results["open_loops"] if row["share"] == HELD]
    if held:
        one = results["one_forward_ms"]["median"]
        add("p99 at 70 % / one forward", [held[0]["latency_ms"]["p99"]], [one], ("<=", 10.0))
    few, many = results["adapters"][:1], results["adapters"][1:]
    for row in many:
        name = f"{row['clients']} adapters / {few[0]['clients']}"
        add(name, row["throughput"], few[0]["throughput"], (">=", 0.5))
    return figures
