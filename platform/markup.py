"""Markup: the elements of a page, and the style they share.

Every text is escaped by `tag`, the only maker of markup. It must not know runs, metrics or charts.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#57606a;--rule:#d5dbe1;--card:#f5f7f9;
--c0:#0b62c4;--c1:#b5480a;--c2:#1a7f4b;--c3:#8a3fb0;--c4:#a8324f;--c5:#5b6472}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--fg:#e6e8eb;--soft:#9aa4af;--rule:#333b45;
--card:#1a2028;--c0:#6db1ff;--c1:#f0a05a;--c2:#5fc98f;--c3:#c993e6;--c4:#f08ba3;--c5:#a9b3bf}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1.5rem 1rem 4rem;background:var(--bg);color:var(--fg);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
h3{font-size:1rem;margin:1rem 0 .2rem}
p{margin:.4rem 0 .8rem;max-width:46rem}
.soft,figcaption{color:var(--soft)}
.lead{font-size:1.1rem}
.tiles,.grid{display:grid;gap:.8rem}
.tiles{grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));margin:1rem 0}
.grid{grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1.2rem 2rem;
align-items:start}
.tile{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
.tile b{display:block;font-size:1.5rem;line-height:1.3;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;
overflow-wrap:normal}
th,td{padding:.22rem .8rem .22rem 0;text-align:right;border-bottom:1px solid var(--rule);
vertical-align:top}
td{white-space:nowrap}
th:first-child,td:first-child{text-align:left}
tbody th{font-weight:400;white-space:normal;overflow-wrap:anywhere;min-width:8rem}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
dl{display:grid;grid-template-columns:minmax(5rem,max-content) 1fr;gap:.15rem 1rem;margin:.5rem 0;
font-size:.9rem}
dt{color:var(--soft)}
dd{margin:0}
figure{margin:0;max-width:31rem}
figcaption{font-size:.9rem;margin-bottom:.2rem}
figcaption b{color:var(--fg)}
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}
svg text{fill:var(--fg);stroke:var(--bg);stroke-width:3px;paint-order:stroke}
.rule{stroke:var(--rule)}
.mark{stroke:var(--fg);stroke-dasharray:2 3}
.line{fill:none;stroke-width:2}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.85rem;padding:0;margin:.2rem 0;
list-style:none}
.legend svg{display:inline-block;width:1.6rem;height:.8rem;vertical-align:-.05rem}
details{margin:.8rem 0}
summary{cursor:pointer;color:var(--c0)}
pre{background:var(--card);padding:.8rem;overflow-x:auto;font-size:.8rem;border-radius:.5rem}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
"""


class Html(str):
    """Markup made here; any other text is escaped before it comes near it."""

    __slots__ = ()


def tag(name: str, *inside: str, **attributes: str | float | None) -> Html:
    """An element; text inside and attributes are escaped. `class_` is `class`, `_` is `-`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(*inside)}</{name}>")


def join(*parts: str) -> Html:
    """Markup one after another; other text is escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def section(title: str, *inside: str) -> Html:
    """A part of a page under its title."""
    return tag("section", tag("h2", title), *inside)


def fold(title: str, *inside: str, opened: bool = False) -> Html:
    """What a reader may unfold."""
    return tag("details", tag("summary", title), *inside, open="" if opened else None)


def tabulate(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A table whose first column names the rows; wide ones scroll by themselves."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = (
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    )
    # A box that scrolls must be reachable by keyboard.
    return tag(
        "div",
        tag("table", tag("thead", top), tag("tbody", *body)),
        class_="scroll",
        tabindex="0",
    )


def list_facts(facts: Mapping[str, Any]) -> Html:
    """Names and their values: text, numbers, or lists and dicts of these."""
    pairs = (join(tag("dt", name), tag("dd", _plain(value))) for name, value in facts.items())
    return tag("dl", *pairs)


def make_page(title: str, *parts: str) -> str:
    """A whole HTML file, which needs nothing from outside and runs no script."""
    head = join(
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        # Even a name that slipped through unescaped could load or run nothing.
        Html(
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        ),
        tag("title", f"{title} – fellray"),
        tag("style", Html(_STYLE)),
    )
    body = tag("body", tag("main", *parts))
    return f"<!doctype html>\n{tag('html', tag('head', head), body, lang='en')}\n"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,.6g}" if isinstance(value, float) else str(value)
