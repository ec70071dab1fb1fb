"""The page of a bench of the service: one HTML file that needs nothing from outside.

It must not know how anything was measured.
"""

from collections.abc import Mapping
from typing import Any

from fellray.jobs.timings import spread
from fellray.platform.charts import Series, draw_lines
from fellray.platform.markup import Html, fold, join, list_facts, make_page, section, tabulate, tag


def write_load_page(results: Mapping[str, Any]) -> str:
    """The whole file."""
    before, after = results["load_average"]
    said = (
        f"{results['users']:,} users of {results['clients']:,} clients, {results['cores']} cores "
        f"for all processes together, load average {before:.1f} before and {after:.1f} after"
        + (
            ": busy, so only ratios of arms that took turns mean something."
            if results["busy"]
            else "."
        )
    )
    return make_page(
        f"{results['run']}: under load",
        tag("h1", f"{results['run']} under load"),
        tag("p", said, class_="lead"),
        _figures(results),
        _latency(results),
        _arms(results),
        _adapters(results),
        fold("Settings", list_facts(results["settings"])),
    )


def _figures(results: Mapping[str, Any]) -> Html:
    if not results["figures"]:
        return Html()
    rows = [
        [
            one["name"],
            "{median:.2f} ({low:.2f} to {high:.2f})".format(**one["ratio"]),
            f"{one['goal'][0]} {one['goal'][1]:g}",
            "met" if one["met"] else "missed",
        ]
        for one in results["figures"]
    ]
    return section(
        "Ratios", tabulate(["median, lowest and highest of the turns", "ratio", "goal", ""], rows)
    )


def _latency(results: Mapping[str, Any]) -> Html:
    loops = results["open_loops"]
    rows = [
        [
            f"{row['rate']:.1f} ({row['share']:.0%})",
            f"{row['throughput']:.1f}",
            *(
                f"{row['latency_ms'].get(p, float('nan')):.1f}"
                for p in ("p50", "p90", "p99", "max")
            ),
            _errors(row["errors"]),
        ]
        for row in loops
    ]
    over_rate = [
        Series(p, {round(row["rate"]): row["latency_ms"][p] for row in loops if row["latency_ms"]})
        for p in ("p50", "p90", "p99")
    ]
    by_share = [
        Series(f"{row['rate']:.0f} a second", dict(enumerate(row["percentiles_ms"], 1)))
        for row in loops
    ]
    return section(
        "Latency",
        tag(
            "p",
            "Requests come when they come (a Poisson process); each one's time counts from when it "
            "was due, so waiting for a slow service counts as well. Milliseconds.",
        ),
        tag(
            "div",
            draw_lines("Latency over rate", "ms", over_rate, across="requests a second"),
            draw_lines("Distribution", "ms, by rate", by_share, across="percentile"),
            class_="grid",
        ),
        tabulate(
            ["requests a second (of saturation)", "answered", "p50", "p90", "p99", "max", "errors"],
            rows,
        ),
    )


def _arms(results: Mapping[str, Any]) -> Html:
    rows = []
    for name, arm in results["arms"].items():
        taken = spread(arm["throughput"])
        cpu, share = arm["service_cpu_ms"], arm["generator_share"]
        rows.append(
            [
                name,
                f"{taken.median:.1f} ({taken.low:.1f} to {taken.high:.1f})",
                f"{spread(cpu).median:.2f}" if cpu else "",
                f"{spread(share).median:.0%}" if share else "",
                _errors(arm["errors"]),
            ]
        )
    parts = [
        tabulate(
            ["arm", "a second", "service's CPU ms each", "generator's share of CPU", "errors"], rows
        )
    ]
    if "tokens" in results:
        tokens, one = results["tokens"], results["one_forward_ms"]
        parts.append(
            tag(
                "p",
                "The bare loop ranks the same users in this process, "
                f"{results['settings']['connections']} at a time: {tokens['median']:.0f} tokens "
                f"each in the middle, {tokens['low']:.0f} to {tokens['high']:.0f}. One "
                f"alone takes {one['median']:.1f} ms.",
            )
        )
    return section("At saturation", *parts)


def _adapters(results: Mapping[str, Any]) -> Html:
    if not results["adapters"]:
        return Html()
    rows = [
        [
            f"{row['clients']:,}",
            f"{spread(row['throughput']).median:.1f}",
            f"{spread(row['p99_ms']).median:.0f}",
            f"{spread(row['hit_rate']).median:.0%}",
            _errors(row["errors"]),
        ]
        for row in results["adapters"]
    ]
    return section(
        "More adapters than there is room for",
        tabulate(["clients, by Zipf's law", "a second", "p99 ms", "in memory", "errors"], rows),
    )


def _errors(errors: Mapping[str, int]) -> Html:
    return join(", ".join(f"{count} {kind}" for kind, count in errors.items()) or "none")
