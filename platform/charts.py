"""The charts: lines over rounds, a bar for each client, methods as points.

Each says in words what it shows, for those who cannot see it. It must not know the pages, nor a
run's files: it takes names and numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import cos, pi, sin
from statistics import fmean, median
from unicodedata import east_asian_width

from fellray.platform.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    draw_figure,
    draw_frame,
    draw_line,
    draw_text,
    fit_axis,
    trace,
)
from fellray.platform.markup import Html, tabulate, tag
from fellray.platform.words import format_count, format_number

_FEW = 40  # clients that get a bar with a name each
_SHAPES: Sequence[Sequence[tuple[float, float]]] = (
    [(cos(turn * pi / 8), sin(turn * pi / 8)) for turn in range(16)],
    [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    [(0, -1.1), (1, 0.8), (-1, 0.8)],
    [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    [(0, 1.1), (1, -0.8), (-1, -0.8)],
    [(-1.1, -0.4), (1.1, -0.4), (1.1, 0.4), (-1.1, 0.4)],
)


@dataclass(frozen=True)
class Series:
    """A line over rounds, and the lowest and highest client around it where there are clients."""

    name: str
    points: dict[int, float]
    band: dict[int, tuple[float, float]] = field(default_factory=dict)


def draw_lines(
    title: str,
    caption: str,
    series: Sequence[Series],
    best: int | None = None,
    across: str = "round",
) -> Html:
    """Values over rounds, the best round marked; nothing where no series has a point.

    Args:
        across: what stands in the place of rounds.
    """
    series = [one for one in series if one.points]
    if not series:
        return Html()
    rounds = sorted({number for one in series for number in one.points})
    x = fit_axis(rounds, LEFT, WIDTH - RIGHT, whole=True)
    heights = [value for one in series for value in one.points.values()]
    heights += [value for one in series for pair in one.band.values() for value in pair]
    y = fit_axis(heights, HEIGHT - BOTTOM, TOP)
    parts, legend, told = [draw_frame(x, y, across, "")], [], []
    if best is not None and rounds[0] <= best <= rounds[-1]:
        at = x.at(best)
        shift, anchor = (-4, "end") if at > WIDTH / 2 else (4, "")
        parts += [
            draw_line(at, TOP, at, HEIGHT - BOTTOM, class_="mark"),
            draw_text(f"best round {best}", at + shift, TOP + 9, anchor),
        ]
    for index, one in enumerate(series):
        look = {"stroke": f"var(--c{index})", "stroke_dasharray": "5 3" if index else None}
        legend.append((draw_line(0, 6, 26, 6, stroke_width=2, **look), one.name))
        if one.band:
            # The outline keeps a band of a single round visible.
            shade = {"fill": look["stroke"], "stroke": look["stroke"], "opacity": "0.16"}
            upper = [(x.at(number), y.at(high)) for number, (_, high) in one.band.items()]
            lower = [(x.at(number), y.at(low)) for number, (low, _) in one.band.items()]
            parts.append(tag("path", d=trace(upper + lower[::-1]) + "Z", **shade))
            block = tag("rect", x=3, y=0, width=20, height=12, **shade)
            legend.append((block, "lowest to highest client"))
        points = [(x.at(number), y.at(value)) for number, value in one.points.items()]
        parts.append(tag("path", d=trace(points), class_="line", **look))
        if len(points) <= 30:
            parts += [
                tag(
                    "circle",
                    tag("title", f"{across} {number}: {format_number(value)}"),
                    cx=x.at(number),
                    cy=y.at(value),
                    r=3,
                    fill=look["stroke"],
                )
                for number, value in one.points.items()
            ]
        first, last, values = min(one.points), max(one.points), one.points.values()
        told.append(
            f"{one.name} from {format_number(one.points[first])} in {across} {first} to "
            f"{format_number(one.points[last])} in {across} {last}, "
            f"lowest {format_number(min(values))}, highest {format_number(max(values))}"
        )
    return draw_figure(title, caption, "; ".join(told), HEIGHT, parts, legend)


def draw_bars(values: Mapping[str, float], pooled: float | None) -> Html:
    """Sorted values: a bar with a name each for few clients, one silhouette for many."""
    ranked = sorted(values.items(), key=lambda pair: (pair[1], pair[0]))
    (worst, low), (best, high) = ranked[0], ranked[-1]
    told = (
        f"{format_count(len(ranked), 'client')}; lowest {worst} with {format_number(low)}, "
        f"median {format_number(median(values.values()))}, highest {best} with "
        f"{format_number(high)}; pooled over all users {format_number(pooled)}"
    )
    extent = [0.0, max(high, pooled or 0.0) or 1.0]
    draw = _draw_named_bars if len(ranked) <= _FEW else _draw_silhouette
    parts, height = draw(ranked, extent, pooled)
    return draw_figure("Test NDCG@10 by client", "Lowest first", told, height, parts, [])


def draw_scatter(across: Mapping[str, Sequence[float]], up: Mapping[str, Sequence[float]]) -> Html:
    """Methods by their pooled value (across) and their lowest client's (up), and the table.

    Args:
        across, up: method -> one value per seed, in the same order in both.
    """
    methods = [method for method in across if across[method] and up.get(method)]
    if not methods:
        return tag("p", "No method has both values.")
    height = 300
    x = fit_axis([v for method in methods for v in across[method]], LEFT, WIDTH - RIGHT)
    y = fit_axis([v for method in methods for v in up[method]], height - BOTTOM, 26)
    seeds, means, legend, rows = [], [], [], []
    for index, method in enumerate(methods):
        seeds += [
            _draw_marker(index, x.at(right), y.at(high), 3.5, "0.5", method)
            for right, high in zip(across[method], up[method], strict=True)
        ]
        right, high = fmean(across[method]), fmean(up[method])
        means.append(_draw_marker(index, x.at(right), y.at(high), 7, "1", f"{method}, mean"))
        legend.append((_draw_marker(index, 13, 6, 5.5, "1", method), method))
        rows.append([method, format_number(right), format_number(high), str(len(up[method]))])
    told = "; ".join(f"{row[0]}: pooled {row[1]}, lowest client {row[2]}" for row in rows)
    frame = draw_frame(x, y, "pooled test NDCG@10", "NDCG@10 of the lowest client")
    title = "Further right: better overall; further up: better for the worst-served client"
    caption = "Small: one seed; large: the mean"
    return tag(
        "div",
        draw_figure(title, caption, told, height, [frame, *seeds, *means], legend),
        tabulate(["", "pooled", "lowest client", "seeds"], rows),
        class_="grid",
    )


def _draw_named_bars(
    ranked: Sequence[tuple[str, float]], extent: Sequence[float], pooled: float | None
) -> tuple[list[Html], int]:
    top, step, left = 22, 18, 104
    height = top + step * len(ranked) + 4
    x = fit_axis(extent, left, WIDTH - 44)
    parts, values = [], []
    for index, (client, value) in enumerate(ranked):
        at = top + step * index
        long = max(0.5, round(x.at(value) - left, 2))
        told = tag("title", f"{client}: {format_number(value)}")
        parts += [
            draw_text(_shorten(client), left - 6, at + 12, "end"),
            tag(
                "rect",
                told,
                x=left,
                y=at + 2,
                width=long,
                height=step - 5,
                rx=2,
                fill="var(--c0)",
            ),
        ]
        values.append(draw_text(format_number(value), left + long + 4, at + 12))
    if pooled is not None:
        parts += [
            draw_line(x.at(pooled), top - 4, x.at(pooled), height, class_="mark"),
            draw_text(f"pooled {format_number(pooled)}", x.at(pooled), 12, "middle"),
        ]
    return parts + values, height


def _draw_silhouette(
    ranked: Sequence[tuple[str, float]], extent: Sequence[float], pooled: float | None
) -> tuple[list[Html], int]:
    x = fit_axis([0, len(ranked)], LEFT, WIDTH - RIGHT, whole=True)
    y = fit_axis(extent, HEIGHT - BOTTOM, TOP)
    corners = [(x.at(0), y.at(0))]
    for index, (_, value) in enumerate(ranked):
        corners += [(x.at(index), y.at(value)), (x.at(index + 1), y.at(value))]
    corners.append((x.at(len(ranked)), y.at(0)))
    parts = [
        draw_frame(x, y, "clients, lowest first", ""),
        tag("path", d=trace(corners) + "Z", fill="var(--c0)", opacity="0.8"),
    ]
    if pooled is not None:
        at = y.at(pooled)
        parts += [
            draw_line(LEFT, at, WIDTH - RIGHT, at, class_="mark"),
            draw_text(f"pooled {format_number(pooled)}", LEFT + 6, at - 5),
        ]
    return parts, HEIGHT


def _draw_marker(index: int, x: float, y: float, size: float, opacity: str, name: str) -> Html:
    """A method's sign: its shape tells it apart where colours do not."""
    corners = _SHAPES[index % len(_SHAPES)]
    path = trace([(round(x + dx * size, 2), round(y + dy * size, 2)) for dx, dy in corners])
    colour = f"var(--c{index % len(_SHAPES)})"
    return tag("path", tag("title", name), d=path + "Z", fill=colour, opacity=opacity)


def _shorten(name: str) -> str:
    """A name that fits beside its bar; East Asian letters are twice as wide."""
    widths = accumulate(2 if east_asian_width(letter) in "WF" else 1 for letter in name)
    fits = sum(width <= 14 for width in widths)
    return name if fits == len(name) else name[: fits - 1] + "…"
