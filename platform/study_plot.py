"""The plot of a study: every arm by two values, with their spread over seeds.

A file of its own, so it carries its style. It must not know runs or pages: it takes numbers.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from fellray.platform.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    draw_frame,
    draw_line,
    draw_text,
    fit_axis,
)
from fellray.platform.drawing import WIDTH as FRAME
from fellray.platform.markup import Html, tag

WIDTH, LINE = 640, 13
_STYLE = (
    "svg{background:#fff;font:11px system-ui,sans-serif}text{fill:#1b1f24}.rule{stroke:#d5dbe1}"
    ".arm{stroke:#0b62c4;fill:#0b62c4}.own{stroke:#b5480a;fill:#b5480a}.lead{stroke:#9aa4af}"
)


def draw_arms(
    title: str,
    across: Mapping[str, Sequence[float]],
    up: Mapping[str, Sequence[float]],
    champion: str,
    right_name: str,
    high_name: str,
) -> str:
    """An SVG file.

    Args:
        across, up: arm -> one value per seed: overall, and (mostly) of the lowest client.
        champion: is drawn in another colour.
        right_name, high_name: what the values are.
    """
    height = max(320, LINE * (len(across) + 4))
    x = fit_axis([v for values in across.values() for v in values], LEFT, FRAME - RIGHT)
    y = fit_axis([v for values in up.values() for v in values], height - BOTTOM, 26)
    parts = [draw_frame(x, y, right_name, high_name)]
    means = {arm: (x.at(fmean(across[arm])), y.at(fmean(up[arm]))) for arm in across}
    for arm, (right, high) in means.items():
        look = "own" if arm == champion else "arm"
        parts += [
            draw_line(x.at(min(across[arm])), high, x.at(max(across[arm])), high, class_=look),
            draw_line(right, y.at(min(up[arm])), right, y.at(max(up[arm])), class_=look),
            tag("circle", tag("title", arm), cx=right, cy=high, r=4, class_=look),
        ]
    # names stand in a column, so that neighbours can be read
    column, at = FRAME + 24, 20.0
    below = sorted(means, key=lambda name: means[name][1])
    for left, arm in zip(range(len(below), 0, -1), below, strict=True):
        right, high = means[arm]
        at = max(at + LINE, min(high, height - LINE * (left + 1)))
        parts += [
            draw_line(right + 5, high, column - 4, at - 4, class_="lead", stroke_width=0.5),
            draw_text(arm, column, at),
        ]
    told = "; ".join(
        f"{arm}: {right_name} {fmean(across[arm]):.4f}, {high_name} {fmean(up[arm]):.4f}"
        for arm in across
    )
    return tag(
        "svg",
        tag("title", title),
        tag("desc", told),
        tag("style", Html(_STYLE)),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        width=WIDTH,
        height=height,
        role="img",
    )
