"""What a person sees of a bench of the service: what is done, the time left, what it came to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.table import Table

from fellray.jobs.bench_serve import Say
from fellray.jobs.display import console, make_bar
from fellray.jobs.timings import spread


@contextmanager
def show_progress(seconds: float) -> Iterator[Say]:
    """A bar with the time left. Args: seconds: all that will be said adds up to about this."""
    with make_bar() as progress:
        task = progress.add_task("", total=seconds)
        before = 0.0

        def say(what: str, takes: float) -> None:
            nonlocal before
            progress.update(task, description=what, advance=before)
            before = takes
            if not console.is_terminal:
                console.print(f"{what} ({takes:.0f} s)")

        yield say


def show_load(results: Mapping[str, Any]) -> None:
    """Tables, widest for a terminal of 80 columns."""
    table = Table("arm", "a second", "CPU ms", "asking", "errors", box=box.SIMPLE)
    for name, arm in results["arms"].items():
        taken = spread(arm["throughput"])
        cpu, share = arm["service_cpu_ms"], arm["generator_share"]
        table.add_row(
            name,
            f"{taken.median:.1f} ({taken.low:.1f}-{taken.high:.1f})",
            f"{spread(cpu).median:.2f}" if cpu else "",
            f"{spread(share).median:.0%}" if share else "",
            str(sum(arm["errors"].values())),
        )
    console.print(table)
    table = Table("rate", "answered", "p50 ms", "p90", "p99", "errors", box=box.SIMPLE)
    for row in results["open_loops"]:
        table.add_row(
            f"{row['rate']:.1f} ({row['share']:.0%})",
            f"{row['throughput']:.1f}",
            *(f"{row['latency_ms'].get(p, float('nan')):.1f}" for p in ("p50", "p90", "p99")),
            str(sum(row["errors"].values())),
        )
    console.print(table)
    if results["adapters"]:
        table = Table("adapters", "a second", "p99 ms", "in memory", "errors", box=box.SIMPLE)
        for row in results["adapters"]:
            table.add_row(
                f"{row['clients']:,}",
                f"{spread(row['throughput']).median:.1f}",
                f"{spread(row['p99_ms']).median:.0f}",
                f"{spread(row['hit_rate']).median:.0%}",
                str(sum(row["errors"].values())),
            )
        console.print(table)
    for figure in results["figures"]:
        console.print(
            "{name}: {median:.2f} ({low:.2f}-{high:.2f}), goal {sign} {bound:g}: {met}".format(
                name=figure["name"],
                **{key: figure["ratio"][key] for key in ("median", "low", "high")},
                sign=figure["goal"][0],
                bound=figure["goal"][1],
                met="met" if figure["met"] else "missed",
            )
        )
    before, after = results["load_average"]
    console.print(
        f"{results['cores']} cores for all processes; load average {before:.1f} before, "
        f"{after:.1f} after" + (": busy, so times mislead" if results["busy"] else "")
    )
