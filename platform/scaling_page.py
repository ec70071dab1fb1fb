"""The page of a sweep over clients, actors and nodes.

Takes a plain dict as it stands in scale.json and gives a string; same input, same bytes. It must
not know where the numbers come from, nor read or write a file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fellray.platform.charts import Series, draw_lines
from fellray.platform.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    draw_figure,
    draw_frame,
    draw_text,
    fit_axis,
    trace,
)
from fellray.platform.markup import Html, fold, list_facts, make_page, section, tabulate, tag
from fellray.platform.words import format_count, format_number, format_size

_PARTS = {
    "own": "compute on the client",
    "trunk": "compute in the trunk",
    "transfer": "transfer",
    "queue": "wait for the server",
    "slowest": "wait for the slowest actor",
    "driver": "driver: mix, install, commit",
}
"""What a round's seconds are split into, as `timed_plant.Split` names it, and what each is."""


def render_scaling(report: Mapping[str, Any]) -> str:
    """The page of `report`, what scale.json holds."""
    points = report["points"]
    return make_page(
        str(report["name"]),
        tag("h1", "Scale"),
        tag("p", _summarise(report), class_="lead"),
        tag("p", _caution(report)),
        section("Nodes come and go", *(_draw_nodes(point) for point in points), _capacity(points)),
        section("Where a round’s seconds go", _draw_parts(points), _rounds(points)),
        section("Memory and cost", _spent(points, report["prices"]["currency"])),
        section("No work is lost", _kept(points)),
        _dry(report["dry"]) if report.get("dry") else "",
        section("What was measured", list_facts(_facts(report))),
    )


def _summarise(report: Mapping[str, Any]) -> str:
    points = report["points"]
    asked = sum(point["updates"]["asked"] for point in points)
    once = sum(point["updates"]["once"] for point in points)
    equal = sum(bool(point["same_hashes"]) for point in points)
    lost = sum(len(point["lost"]) for point in points)
    return (
        f"{format_count(len(points), 'layout')}, each from no client nodes to those it needs and "
        f"back. {once:,} of {asked:,} updates of sampled clients were counted exactly once; "
        f"{equal} of {len(points)} ended with the adapters of the same training without Ray, to "
        f"the bit; {format_count(lost, 'node')} lost while training went on."
    )


def _caution(report: Mapping[str, Any]) -> str:
    words = []
    if report["nodes"] == "pretended":
        words.append(
            f"The nodes are pretended: processes of one machine with {report['cpus']} cores, which "
            "they share. Times for nodes to come hold no time to start a machine, and rounds do "
            "not become faster with more nodes."
        )
    if report["busy"]:
        before, after = report["load_average"]
        words.append(
            f"The machine was busy (load average {before:.1f} before, {after:.1f} after): seconds "
            "are not to be quoted."
        )
    return " ".join(words)


def _name(point: Mapping[str, Any]) -> str:
    return f"{point['registered']:,} / {point['sampled']} / {point['actors']} / {point['nodes']}"


def _draw_nodes(point: Mapping[str, Any]) -> Html:
    seen: Sequence[tuple[float, float]] = point["nodes_seen"]
    end = seen[-1][0] + 1.0
    x = fit_axis([0.0, end], LEFT, WIDTH - RIGHT)
    y = fit_axis([0, max(2, *(count for _, count in seen))], HEIGHT - BOTTOM, TOP, whole=True)
    corners: list[tuple[float, float]] = []
    held = 0.0
    for at, count in [*seen, (end, seen[-1][1])]:
        moment = x.at(max(at, 0.0))
        corners += [(moment, y.at(held)), (moment, y.at(count))]
        held = count
    ready, ended = point["capacity_s"], point["capacity_s"] + point["training_s"]
    trained = tag(
        "rect",
        tag("title", f"training: from {ready:.0f} s to {ended:.0f} s"),
        x=x.at(ready),
        y=TOP,
        width=round(max(0.5, x.at(ended) - x.at(ready)), 2),
        height=HEIGHT - BOTTOM - TOP,
        fill="var(--c0)",
        opacity="0.12",
    )
    most = max(count for _, count in seen)
    told = (
        f"client nodes from 0 to {most} and back to {seen[-1][1]} within {end:.0f} seconds; "
        f"training from second {ready:.0f} to {ended:.0f}"
    )
    parts = [
        trained,
        draw_frame(x, y, "seconds", "client nodes"),
        tag("path", d=trace(corners), class_="line", stroke="var(--c0)"),
        draw_text("training", x.at(ready) + 3, TOP + 10),
    ]
    return draw_figure(f"Nodes, {_name(point)}", "Shaded: training", told, HEIGHT, parts, [])


def _capacity(points: Sequence[Mapping[str, Any]]) -> Html:
    head = [
        "registered / sampled / actors / nodes",
        "server there, s",
        "autoscaler lag, s",
        "actors loaded, s",
        "time to capacity, s",
        "nodes gone after, s",
    ]
    keys = ("server_s", "lag_s", "actors_s", "capacity_s", "down_s")
    rows = [[_name(p), *(format_number(p[key], 1) for key in keys)] for p in points]
    note = (
        "Autoscaler lag: from when the client actors were asked for, the server being there, until "
        "the last node had joined. Time to capacity is the sum of the three before it."
    )
    return tag("div", tabulate(head, rows), tag("p", note, class_="soft"))


def _draw_parts(points: Sequence[Mapping[str, Any]]) -> Html:
    """One bar a layout, its parts side by side."""
    top, step, left = 8, 24, 128
    height = top + step * len(points) + BOTTOM
    x = fit_axis([0.0, max(p["round"]["seconds"] for p in points)], left, WIDTH - RIGHT)
    parts, told = [], []
    for index, point in enumerate(points):
        at, y = 0.0, top + step * index
        parts.append(draw_text(_name(point), left - 6, y + 13, "end"))
        for colour, (key, words) in enumerate(_PARTS.items()):
            value = max(0.0, point["round"][key])
            parts.append(
                tag(
                    "rect",
                    tag("title", f"{words}: {value:.3f} s"),
                    x=x.at(at),
                    y=y,
                    width=round(x.at(at + value) - x.at(at), 2),
                    height=step - 6,
                    fill=f"var(--c{colour})",
                )
            )
            at += value
        told.append(f"{_name(point)}: {point['round']['seconds']:.2f} s")
    ends = top + step * len(points)
    parts += [draw_text(x.label(tick), x.at(tick), ends + 14, "middle") for tick in x.ticks]
    parts.append(draw_text("seconds", (left + WIDTH - RIGHT) / 2, ends + 30, "middle"))
    legend = [
        (tag("rect", x=3, y=0, width=20, height=12, fill=f"var(--c{colour})"), words)
        for colour, words in enumerate(_PARTS.values())
    ]
    caption = "Median of the rounds after the first, without those in which a node was lost"
    return draw_figure("A round", caption, "; ".join(told), height, parts, legend)


def _rounds(points: Sequence[Mapping[str, Any]]) -> Html:
    head = ["registered / sampled / actors / nodes", "round, s", *_PARTS.values()]
    head += ["calls a batch", "tokens a batch", "of the most"]
    rows = [
        [
            _name(p),
            format_number(p["round"]["seconds"], 2),
            *(format_number(p["round"][key], 3) for key in _PARTS),
            format_number(p["round"]["calls_per_batch"], 2),
            format_number(p["round"]["tokens_per_batch"], 0),
            f"{p['round']['occupancy']:.1%}",
        ]
        for p in points
    ]
    curves = [
        draw_lines(
            f"Rounds, {_name(p)}",
            "Seconds of every round",
            [Series("seconds", {row["round"]: row["seconds"] for row in p["rounds"]})],
        )
        for p in points
    ]
    return tag(
        "div",
        tabulate(head, rows),
        fold("Every round", tag("div", *curves, class_="grid")),
    )


def _spent(points: Sequence[Mapping[str, Any]], currency: str) -> Html:
    head = [
        "registered / sampled / actors / nodes",
        "client actors weigh",
        "by registered client",
        "by sampled client",
        f"{currency} a round",
        f"{currency} in all",
    ]
    rows = [
        [
            _name(p),
            format_size(p["round"]["pss"]),
            format_size(p["client_bytes"]),
            format_size(p["sampled_bytes"]),
            format_number(p["cost_per_round"], 6),
            format_number(p["cost_whole"], 5),
        ]
        for p in points
    ]
    note = (
        "Memory is PSS, a page that processes share being counted once, and mostly the code that "
        "every actor loads. In all: from asking for nodes until the last one had gone, at the "
        "price table below."
    )
    return tag("div", tabulate(head, rows), tag("p", note, class_="soft"))


def _kept(points: Sequence[Mapping[str, Any]]) -> Html:
    head = ["registered / sampled / actors / nodes", "asked", "counted once", "missing", "more"]
    head += ["of others", "nodes lost", "same adapters"]
    keys = ("asked", "once", "missing", "more", "of_others")
    rows = [
        [
            _name(p),
            *(f"{p['updates'][key]:,}" for key in keys),
            str(len(p["lost"])),
            "yes" if p["same_hashes"] else "NO",
        ]
        for p in points
    ]
    events = [f"{_name(p)}: {e}" for p in points for row in p["rounds"] for e in row["events"]]
    happened = fold("What was lost and begun again", tag("ul", *(tag("li", e) for e in events)))
    return tag("div", tabulate(head, rows), happened if events else "")


def _dry(dry: Mapping[str, Any]) -> Html:
    fits = "all placed" if dry["placed"] == dry["actors"] else f"{dry['placed']} of them placed"
    return section(
        f"Dry: {dry['registered']:,} clients",
        tag(
            "p",
            f"Registered, drawn from and placed; nothing was trained. Registering took "
            f"{dry['register_s']:.3f} s, drawing {dry['sampled']} clients {dry['draw_s'] * 1e3:.3f}"
            f" ms. {format_count(dry['actors'], 'actor')} of {dry['per_actor']:,} clients on "
            f"{format_count(dry['nodes'], 'node')}: {fits}.",
        ),
    )


def _facts(report: Mapping[str, Any]) -> dict[str, Any]:
    before, after = report["load_average"]
    prices = report["prices"]
    return {
        "nodes": report["nodes"],
        "CPUs of a client node": report["node_cpus"],
        "cores here": report["cpus"],
        "load average": f"{before:.1f} before, {after:.1f} after",
        "rounds": report["rounds"],
        f"prices, {prices['currency']} an hour": prices["per_hour"],
        "changed settings": report["overrides"] or "none",
    }
