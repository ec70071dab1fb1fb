"""What a chart is drawn with: an axis, its frame, lines and words, as inline SVG.

It must not know what is drawn. Coordinates are those of a box WIDTH wide; y grows downwards.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fellray.platform.markup import Html, join, tag

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 212, 46, 20, 12, 36
"""A chart's box, and the margins around its frame."""


@dataclass(frozen=True)
class Axis:
    """Values to coordinates."""

    ticks: Sequence[float]
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The coordinate of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def label(self, tick: float) -> str:
        """A tick as text, with the digits that tell it from the next one."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def fit_axis(values: Sequence[float], start: float, end: float, whole: bool = False) -> Axis:
    """An axis with ticks at 1, 2 or 5 times a power of ten; `whole`: only at whole numbers."""
    low, high = min(values), max(values)
    if low == high:
        room = 0.5 if whole else abs(low) / 10 or 0.5
        low, high = low - room, high + room
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = step * first, step * last
    return Axis([step * number for number in range(first, last + 1)], low, high, start, end)


def draw_frame(x: Axis, y: Axis, across: str, up: str) -> Html:
    """Grid lines, tick labels and the names of the axes."""
    bottom = max(y.start, y.end)
    parts = [
        draw_text(across, (LEFT + WIDTH - RIGHT) / 2, bottom + 31, "middle"),
        draw_text(up, 2, 11),
    ]
    for tick in y.ticks:
        parts.append(draw_line(LEFT, y.at(tick), WIDTH - RIGHT, y.at(tick), class_="rule"))
        parts.append(draw_text(y.label(tick), LEFT - 5, y.at(tick) + 4, "end"))
    parts += [draw_text(x.label(tick), x.at(tick), bottom + 17, "middle") for tick in x.ticks]
    return join(*parts)


def draw_figure(
    title: str,
    caption: str,
    told: str,
    height: int,
    parts: Iterable[Html],
    legend: Sequence[tuple[Html, str]],
) -> Html:
    """A chart with its name, its words for those who cannot see it, and its legend."""
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    entries = [
        tag("li", tag("svg", drawn, viewBox="0 0 26 12", aria_hidden="true"), " ", words)
        for drawn, words in legend
    ]
    return tag(
        "figure",
        tag("figcaption", tag("b", title), ". ", caption),
        tag(
            "svg",
            tag("title", title, id=f"{name}-title"),
            tag("desc", told, id=f"{name}-desc"),
            *parts,
            viewBox=f"0 0 {WIDTH} {height}",
            role="img",
            aria_labelledby=f"{name}-title {name}-desc",
        ),
        tag("ul", *entries, class_="legend") if entries else "",
    )


def draw_line(x1: float, y1: float, x2: float, y2: float, **look: str | float | None) -> Html:
    """A straight line from (x1, y1) to (x2, y2)."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **look)


def draw_text(words: str, x: float, y: float, anchor: str = "") -> Html:
    """Words that begin at (x, y), or have their `middle` or `end` there."""
    return tag("text", words, x=x, y=y, text_anchor=anchor or None)


def trace(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a path through the points."""
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
