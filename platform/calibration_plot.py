"""The chart of calibration: how often was clicked what was foretold with which probability.

It must not know how the numbers were counted.
"""

from collections.abc import Mapping, Sequence

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
    fit_axis,
    trace,
)
from fellray.platform.markup import Html, tag

MOST, LEAST = 9.0, 2.0
"""Area of a bin's point: that of the fullest bin, and of one that holds next to nothing (radii)."""


def draw_calibration(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Html:
    """A curve for each row of the test; a point's area follows the samples in its bin.

    Args:
        curves: name -> bins as `ClickScore.reliability` lists them; empty ones are not drawn.
    """
    x = fit_axis([0.0, 1.0], LEFT, WIDTH - RIGHT)
    y = fit_axis([0.0, 1.0], HEIGHT - BOTTOM, TOP)
    parts = [
        draw_frame(x, y, "mean probability foretold", ""),
        draw_line(x.at(0), y.at(0), x.at(1), y.at(1), class_="mark"),
    ]
    legend = [(draw_line(0, 6, 26, 6, class_="mark"), "perfectly calibrated")]
    told = []
    for index, (name, bins) in enumerate(curves.items()):
        if not bins:
            continue
        colour = f"var(--c{index})"
        look = {"stroke": colour, "stroke_dasharray": "5 3" if index else None}
        points = [(x.at(one["foretold"]), y.at(one["clicked"])) for one in bins]
        parts.append(tag("path", d=trace(points), class_="line", **look))
        fullest = max(one["samples"] for one in bins)
        for one, (right, high) in zip(bins, points, strict=True):
            words = f"{name}: {one['foretold']:.3f} foretold, {one['clicked']:.3f} clicked"
            size = round(max(LEAST, MOST * (one["samples"] / fullest) ** 0.5), 2)
            point = tag("title", f"{words}, {one['samples']:,.0f} samples")
            parts.append(
                tag("circle", point, cx=right, cy=high, r=size, fill=colour, opacity="0.55")
            )
        legend.append((draw_line(0, 6, 26, 6, stroke_width=2, **look), name))
        told += [
            f"{name}: "
            + ", ".join(f"{one['foretold']:.2f} foretold {one['clicked']:.2f}" for one in bins)
        ]
    title = "Share clicked by probability foretold"
    caption = "Larger points: more samples; above the dotted line: clicked oftener than foretold"
    return draw_figure(title, caption, "; ".join(told), HEIGHT, parts, legend)
