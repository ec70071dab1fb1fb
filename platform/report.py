"""One HTML file that shows a run, or methods side by side, to a colleague.

Takes plain dicts as they stand in the run's JSON files and gives a string; same input, same bytes.
Must not know where the numbers come from, nor read or write a file. The page needs nothing from
outside: its few charts are drawn here as inline SVG, each with a table near it. Every text is
escaped by `_tag`, the only maker of markup.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, median
from typing import Any

_BASELINES = {
    "popularity": "items in order of their count, for everybody alike",
    "prior": "each client's own count prior alone, without the language model",
    "untrained": "the model as it was before the first round",
}
_STATISTICS = {
    "mean": "mean of clients",
    "std": "standard deviation (population)",
    "cv": "standard deviation / mean",
    "min": "lowest client",
    "worst_decile": "mean of the lowest 10 %",
    "max_min": "highest minus lowest",
    "jain": "Jain index (1: all equal)",
}
_LESS_IS_BETTER = ("balance/std", "balance/cv", "balance/max_min")
_FAMILIES = ("ndcg", "recall", "hit", "mrr", "coverage")
_HEADLINE = "ndcg@10"
_FEW = 40  # clients that get a bar with a name each
_ENDS = 100  # clients listed from either end where there are more than twice as many
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 210, 46, 12, 12, 34

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
p{margin:.4rem 0 .8rem;max-width:46rem}
.soft,figcaption,small,caption{color:var(--soft)}
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
caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.22rem .8rem .22rem 0;text-align:right;border-bottom:1px solid var(--rule);
vertical-align:top}
th:first-child,td:first-child{text-align:left}
tbody th{font-weight:400;overflow-wrap:anywhere;min-width:6rem}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
dl{display:grid;grid-template-columns:minmax(5rem,max-content) 1fr;gap:.15rem 1rem;margin:.5rem 0;
font-size:.9rem}
dt{color:var(--soft)}
dd{margin:0}
figure{margin:0;max-width:31rem}
figcaption{font-size:.9rem;margin-bottom:.2rem}
figcaption b{color:var(--fg)}
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}
svg text{fill:var(--soft)}
svg .over{fill:var(--fg);stroke:var(--bg);stroke-width:3px;paint-order:stroke}
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


class _Html(str):
    """Markup made here; any other text is escaped before it comes near it."""

    __slots__ = ()


@dataclass(frozen=True)
class _Axis:
    """Values to coordinates."""

    ticks: Sequence[float]
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def label(self, tick: float) -> str:
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


@dataclass(frozen=True)
class _Series:
    """A line over rounds, and the lowest and highest client around it where there are clients."""

    name: str
    points: dict[int, float]
    band: dict[int, tuple[float, float]]


def render(
    summary: dict[str, Any],
    metrics: list[dict[str, Any]],
    ledger_totals: dict[str, Any],
    config: dict[str, Any],
    costs: dict[str, Any] | None,
) -> str:
    """The page of one run.

    Args:
        summary: `run`, `method`, `seed`, `rounds`, `best_round`, `clients` (a count or ids),
            `test` and `validation` (metric -> pooled value), `per_client` (client -> metric ->
            value, and `users`), `balance` (of test NDCG@10), `bytes`, `hashes`, `popularity`,
            `prior`, `untrained` (metric -> test value), `data`, `model`, `environment`, `events`.
            What is missing is left out of the page.
        metrics: rows of metrics.jsonl; of several rows of one round the last counts.
        ledger_totals: kind -> bytes; where empty, `summary["bytes"]` is shown.
        config: the resolved config.
        costs: measured costs by name (values, or dicts of values), None where not measured.
    """
    rows = list({row["round"]: row for row in metrics}.values())
    rows.sort(key=lambda row: int(row["round"]))
    return _page(
        str(summary.get("run", "run")),
        _head(summary),
        _tested(summary),
        _curves(summary, rows),
        _clients(summary),
        _traffic(ledger_totals or summary.get("bytes") or {}, summary, rows),
        _happened(summary, rows),
        _section("Costs", _facts(costs)) if costs else "",
        _provenance(summary),
        _fold("Resolved config", _tag("pre", json.dumps(config, indent=2, default=str))),
    )


def render_comparison(
    compare: dict[str, Any], balances: dict[str, Any], meta: dict[str, Any]
) -> str:
    """The page that sets methods side by side.

    Args:
        compare: method -> metric -> {`mean`, `std`, `values` (one per seed)}, test metrics and
            `balance/min` and the like (of NDCG@10).
        balances: method -> seed -> statistic -> value, as `metrics.balance` gives it; may be empty.
        meta: `name` and `seeds`; everything else in it is listed as it is.
    """
    lowest = {
        method: table["balance/min"]["values"]
        if "balance/min" in table
        else [seed["min"] for seed in balances.get(method, {}).values()]
        for method, table in compare.items()
    }
    pooled = {method: table[_HEADLINE]["values"] for method, table in compare.items()}
    rest = {name: value for name, value in meta.items() if name != "name"}
    by_seed = [
        [f"{method}, seed {seed}", *(_number(values.get(key)) for key in _STATISTICS)]
        for method, seeds in balances.items()
        for seed, values in seeds.items()
    ]
    return _page(
        str(meta.get("name", "Comparison")),
        _tag("h1", str(meta.get("name", "Comparison"))),
        _tag("p", f"{_count(len(compare), 'method')}: {', '.join(compare)}", class_="soft"),
        _tag("p", _verdict("Pooled test NDCG@10", pooled), class_="lead"),
        _tag("p", _verdict("NDCG@10 of the lowest client", lowest), class_="lead"),
        _section("Overall against the lowest client", _scatter(pooled, lowest)),
        _section("All metrics", _side_by_side(compare)),
        _fold("Balance of NDCG@10 by seed", _table(["", *_STATISTICS.values()], by_seed))
        if by_seed
        else "",
        _section("What was compared", _facts(rest)) if rest else "",
    )


# The parts of a run's page, in their order.


def _head(summary: Mapping[str, Any]) -> _Html:
    test, balance = summary.get("test") or {}, summary.get("balance") or {}
    clients = summary.get("clients", len(summary.get("per_client") or {}))
    facts = [
        f"method {summary.get('method', '?')}",
        f"seed {summary.get('seed', '?')}",
        _count(clients if isinstance(clients, int) else len(clients), "client"),
        _count(summary.get("rounds", 0), "round")
        + (
            f", best round {summary['best_round']}" if summary.get("best_round") is not None else ""
        ),
        f"data {(summary.get('data') or {}).get('path', '?')}",
        f"model {(summary.get('model') or {}).get('name', '?')}",
    ]
    tiles = [
        ("test NDCG@10", test.get(_HEADLINE)),
        ("lowest client’s NDCG@10", balance.get("min")),
        ("test Recall@10", test.get("recall@10")),
        ("Jain index of clients", balance.get("jain")),
    ]
    return _join(
        _tag("h1", str(summary.get("run", "run"))),
        _tag("p", " · ".join(facts), class_="soft"),
        _tag("p", _lead(summary), class_="lead"),
        _tag(
            "div",
            *(
                _tag("div", _tag("b", _number(value)), label, class_="tile")
                for label, value in tiles
                if value is not None
            ),
            class_="tiles",
        ),
    )


def _lead(summary: Mapping[str, Any]) -> str:
    own = (summary.get("test") or {}).get(_HEADLINE)
    if own is None:
        return "This run has no test metrics."
    users = sum(int(row.get("users", 0)) for row in (summary.get("per_client") or {}).values())
    text = f"Test NDCG@10 is {own:.4f}" + (f" over {_count(users, 'user')}" if users else "")
    rivals = {name: (summary.get(name) or {}).get(_HEADLINE) for name in _BASELINES}
    known = {name: value for name, value in rivals.items() if value is not None}
    if not known:
        return f"{text}; no baseline was measured."
    name, value = max(known.items(), key=lambda rival: rival[1])
    if _number(own) == _number(value):
        distance = "level with"
    elif value == 0:
        distance = "above"
    else:
        distance = f"{abs(own / value - 1):.1%} {'above' if own > value else 'below'}"
    return (
        f"{text}, {distance} the strongest baseline ({name}, {value:.4f}). "
        "One run with one seed: compare seeds before calling it a difference."
    )


def _tested(summary: Mapping[str, Any]) -> _Html:
    columns = {"this run": summary.get("test") or {}}
    columns |= {name: summary[name] for name in _BASELINES if summary.get(name)}
    validation = summary.get("validation")
    if validation:
        columns["this run, validation"] = validation
    rows = [
        [_title(metric), *(_number(column.get(metric)) for column in columns.values())]
        for metric in _ordered({metric for column in columns.values() for metric in column})
    ]
    notes = "; ".join(f"{name}: {_BASELINES[name]}" for name in columns if name in _BASELINES)
    return _section(
        "Test metrics",
        _tag("p", "Full ranking over all items, seen items masked, averaged over users. ", notes),
        _table(["", *columns], rows),
    )


def _curves(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> _Html:
    if not rows:
        return _section("Rounds", _tag("p", "No round was trained."))
    best = summary.get("best_round")
    loss = _Series("mean loss", _over(rows, lambda row: row.get("loss")), _bands(rows, "losses"))
    pooled = _Series(
        "pooled", _over(rows, lambda row: (row.get("validation") or {}).get(_HEADLINE)), {}
    )
    worst = _Series("worst client", _over(rows, lambda row: row.get("worst_ndcg@10")), {})
    weight = _Series("median client", _medians(rows, "own_weight"), _bands(rows, "own_weight"))
    degree = _Series(
        "median client", _medians(rows, "learning_degree"), _bands(rows, "learning_degree")
    )
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "training loss": lambda row: _number(row.get("loss")),
        "lowest": lambda row: _number(_extreme(row.get("losses"), min)),
        "highest": lambda row: _number(_extreme(row.get("losses"), max)),
        "NDCG@10, pooled": lambda row: _number((row.get("validation") or {}).get(_HEADLINE)),
        "worst client": lambda row: _number(row.get("worst_ndcg@10")),
        "own weight": lambda row: _number(_extreme(row.get("own_weight"), median)),
        "learning degree": lambda row: _number(_extreme(row.get("learning_degree"), median)),
        "seconds": lambda row: _number(row.get("seconds"), 1),
        "samples/s": lambda row: _number(row.get("samples_per_second"), 1),
        "sent": lambda row: _sent(row.get("bytes")),
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = {name: column for name, column in cells.items() if set(column) != {"–"}}
    return _section(
        "Rounds",
        _tag(
            "div",
            _lines("Training loss", "Mean over clients by round", [loss], best),
            _lines("Validation NDCG@10", "Full ranking, by round", [pooled, worst], best),
            _lines("Own weight", "Share of a client’s own adapters in its mixture", [weight], best),
            _lines(
                "Learning degree", "How far a client takes the others in (0 to 1)", [degree], best
            ),
            class_="grid",
        ),
        _fold(
            "The numbers of every round",
            _table(
                ["round", *shown],
                [
                    [str(row["round"]), *(column[index] for column in shown.values())]
                    for index, row in enumerate(rows)
                ],
            ),
            opened=len(rows) <= 12,
        ),
    )


def _clients(summary: Mapping[str, Any]) -> _Html:
    per_client = summary.get("per_client") or {}
    if not per_client:
        return _Html()
    hashes, balance = summary.get("hashes") or {}, summary.get("balance") or {}
    values = {
        client: float(row[_HEADLINE]) for client, row in per_client.items() if _HEADLINE in row
    }
    ranked = sorted(per_client, key=lambda client: (values.get(client, -1.0), client))
    names = _ordered({name for row in per_client.values() for name in row} - {"users"})
    names = [name for name in names if name.endswith("@10")] or names
    listed = ranked
    if len(ranked) > 2 * _ENDS:
        listed = ranked[:_ENDS] + ranked[-_ENDS:]
    head = ["client", "users", *map(_title, names), *(["adapters"] if hashes else [])]
    rows = [
        [
            client,
            str(per_client[client].get("users", "–")),
            *(_number(per_client[client].get(name)) for name in names),
            *([str(hashes.get(client, "–"))[:12]] if hashes else []),
        ]
        for client in listed
    ]
    cut = (
        f" (the {_ENDS} lowest and the {_ENDS} highest of {len(ranked)})"
        if listed != ranked
        else ""
    )
    return _section(
        "Clients",
        _tag(
            "div",
            _bars(values, (summary.get("test") or {}).get(_HEADLINE)) if values else "",
            _table(
                ["NDCG@10 over clients", ""],
                [
                    [words, _number(balance[key])]
                    for key, words in _STATISTICS.items()
                    if key in balance
                ],
            )
            if balance
            else "",
            class_="grid",
        ),
        _fold(f"Every client, lowest first{cut}", _table(head, rows), opened=len(rows) <= 12),
    )


def _traffic(
    totals: Mapping[str, int], summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> _Html:
    if not totals:
        return _Html()
    # A client that sat a round out, or was refused, has no loss in that round's row.
    turns = sum(len(row.get("losses") or {}) for row in rows)
    kinds = sorted(totals.items(), key=lambda kind: (-kind[1], kind[0]))
    everything = sum(totals.values())
    cells = [
        [
            kind,
            _size(count),
            f"{count:,}",
            f"{count / everything:.1%}" if everything else "–",
            _size(count / turns) if turns else "–",
        ]
        for kind, count in [*kinds, ("all", everything)]
    ]
    per = f" A client-round is one client in one round; there were {turns:,}." if turns else ""
    return _section(
        "Bytes moved",
        _tag("p", f"What the clients sent and received, by kind, from the ledger.{per}"),
        _table(["kind", "size", "bytes", "share", "per client-round"], cells),
    )


def _happened(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> _Html:
    events = [
        f"round {row['round']}: client {client} refused: {reason}"
        for row in rows
        for client, reason in sorted((row.get("refused") or {}).items())
    ]
    events += [str(event) for event in summary.get("events") or []]
    if not events:
        return _section(
            "What happened", _tag("p", "No refused client, replay or restart is recorded.")
        )
    return _section("What happened", _tag("ul", *(_tag("li", event) for event in events)))


def _provenance(summary: Mapping[str, Any]) -> _Html:
    parts = {name: summary[name] for name in ("data", "model", "environment") if summary.get(name)}
    if not parts:
        return _Html()
    return _section(
        "Data, model, environment",
        *(_join(_tag("h3", name.capitalize()), _facts(part)) for name, part in parts.items()),
    )


# The parts of a comparison.


def _verdict(what: str, values: Mapping[str, Sequence[float]]) -> str:
    known = {method: own for method, own in values.items() if own}
    if len(known) < 2:
        return f"{what}: fewer than two methods were measured, so there is nothing to compare."
    ranked = sorted(known, key=lambda method: -fmean(known[method]))
    best = ranked[0]
    text = f"{what}: {best} has the highest mean, {fmean(known[best]):.4f}"
    if min(map(len, known.values())) == 1:
        return (
            f"{text} (next: {ranked[1]}, {fmean(known[ranked[1]]):.4f}). A method with a single "
            "seed shows no spread, so this is not yet evidence of a difference."
        )
    text += f" over {len(known[best])} seeds. "
    level = [method for method in ranked[1:] if max(known[method]) >= min(known[best])]
    if level:
        return (
            f"{text}The spread overlaps with that of {', '.join(level)}: these seeds do not "
            "tell them apart."
        )
    return (
        f"{text}The spread does not overlap: its worst seed is above the best seed of every other "
        f"method (next: {ranked[1]}, {fmean(known[ranked[1]]):.4f})."
    )


def _side_by_side(compare: Mapping[str, Any]) -> _Html:
    rows = []
    for metric in _ordered({metric for table in compare.values() for metric in table}):
        means = {
            method: table[metric]["mean"] for method, table in compare.items() if metric in table
        }
        best = None
        if len(means) > 1 and not metric.startswith("coverage"):
            best = (min if metric in _LESS_IS_BETTER else max)(means.values())
        cells: list[str] = [_title(metric)]
        for method, table in compare.items():
            if method not in means:
                cells.append("–")
                continue
            text = f"{_number(means[method])} ± {_number(table[metric]['std'])}"
            seeds = ", ".join(map(_number, table[metric]["values"]))
            cells.append(
                _join(
                    _tag("b", text) if means[method] == best else text,
                    _tag("br"),
                    _tag("small", seeds),
                )
            )
        rows.append(cells)
    return _join(
        _tag(
            "p",
            "Mean ± standard deviation over seeds, each seed’s value below. Bold: the best "
            "mean of the row, which alone proves no difference.",
        ),
        _table(["", *compare], rows),
    )


# Charts.


def _lines(title: str, caption: str, series: Sequence[_Series], best: int | None) -> _Html:
    series = [one for one in series if one.points]
    if not series:
        return _Html()
    rounds = sorted({number for one in series for number in one.points})
    x = _axis(rounds, _LEFT, _WIDTH - _RIGHT, whole=True)
    heights = [value for one in series for value in one.points.values()]
    heights += [value for one in series for pair in one.band.values() for value in pair]
    y = _axis(heights, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x, y, "round", "")]
    for index, one in enumerate(series):
        colour = f"var(--c{index})"
        if len(one.band) > 1:
            upper = [(x.at(number), y.at(high)) for number, (_, high) in one.band.items()]
            lower = [(x.at(number), y.at(low)) for number, (low, _) in one.band.items()]
            parts.append(
                _tag("path", d=_path(upper + lower[::-1]) + "Z", fill=colour, opacity="0.15")
            )
        elif one.band:
            ((number, (low, high)),) = one.band.items()
            parts.append(
                _tag(
                    "line",
                    x1=x.at(number),
                    x2=x.at(number),
                    y1=y.at(low),
                    y2=y.at(high),
                    stroke=colour,
                    stroke_width=6,
                    opacity="0.25",
                )
            )
    if best is not None and rounds[0] <= best <= rounds[-1]:
        at = x.at(best)
        parts.append(_tag("line", x1=at, x2=at, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="mark"))
        left = at > _WIDTH / 2
        parts.append(
            _tag(
                "text",
                f"best round {best}",
                x=at - 4 if left else at + 4,
                y=_TOP + 9,
                text_anchor="end" if left else "start",
                class_="over",
            )
        )
    for index, one in enumerate(series):
        colour, dashes = f"var(--c{index})", "5 3" if index else None
        points = [(x.at(number), y.at(value)) for number, value in one.points.items()]
        parts.append(
            _tag("path", d=_path(points), stroke=colour, stroke_dasharray=dashes, class_="line")
        )
        if len(points) <= 30:
            parts += [
                _tag(
                    "circle",
                    _tag("title", f"round {number}: {_number(value)}"),
                    cx=x.at(number),
                    cy=y.at(value),
                    r=3,
                    fill=colour,
                )
                for number, value in one.points.items()
            ]
    told = "; ".join(
        f"{one.name} from {_number(next(iter(one.points.values())))} in round {min(one.points)} to "
        f"{_number(list(one.points.values())[-1])} in round {max(one.points)}, lowest "
        f"{_number(min(one.points.values()))}, highest {_number(max(one.points.values()))}"
        for one in series
    )
    legend = []
    for index, one in enumerate(series):
        stroke = _tag(
            "line",
            x1=0,
            x2=26,
            y1=6,
            y2=6,
            stroke=f"var(--c{index})",
            stroke_width=2,
            stroke_dasharray="5 3" if index else None,
        )
        legend.append((stroke, one.name))
        if one.band:
            block = _tag(
                "rect", x=3, y=0, width=20, height=12, fill=f"var(--c{index})", opacity="0.2"
            )
            legend.append((block, "lowest to highest client"))
    return _figure(title, caption, told, _HEIGHT, parts, legend)


def _bars(values: Mapping[str, float], pooled: float | None) -> _Html:
    ranked = sorted(values.items(), key=lambda pair: (pair[1], pair[0]))
    title, caption = "Test NDCG@10 by client", "Lowest first"
    told = (
        f"{len(ranked)} clients; lowest {ranked[0][0]} with {_number(ranked[0][1])}, median "
        f"{_number(median(values.values()))}, highest {ranked[-1][0]} with "
        f"{_number(ranked[-1][1])}"
    ) + (f"; pooled over all users {_number(pooled)}" if pooled is not None else "")
    extent = [0.0, max(ranked[-1][1], pooled or 0.0) or 1.0]
    label = f"pooled {_number(pooled)}"
    parts: list[_Html] = []
    if len(ranked) <= _FEW:
        top, step, left = 22, 18, 104
        height = top + step * len(ranked) + 4
        x = _axis(extent, left, _WIDTH - 44)
        for index, (client, value) in enumerate(ranked):
            at = top + step * index
            name = client if len(client) <= 15 else client[:14] + "…"
            parts += [
                _tag("text", _tag("title", client), name, x=left - 6, y=at + 12, text_anchor="end"),
                _tag(
                    "rect",
                    _tag("title", f"{client}: {_number(value)}"),
                    x=left,
                    y=at + 2,
                    width=max(0.5, round(x.at(value) - left, 2)),
                    height=step - 5,
                    rx=2,
                    fill="var(--c0)",
                ),
            ]
        if pooled is not None:
            at_x = x.at(pooled)
            parts.append(_tag("line", x1=at_x, x2=at_x, y1=top - 4, y2=height, class_="mark"))
            anchor = "end" if at_x > _WIDTH - 60 else "middle"
            parts.append(_tag("text", label, x=at_x, y=12, text_anchor=anchor))
        parts += [
            _tag(
                "text", _number(value), x=x.at(value) + 4, y=top + step * index + 12, class_="over"
            )
            for index, (_, value) in enumerate(ranked)
        ]
        return _figure(title, caption, told, height, parts, [])
    x = _axis([0, len(ranked)], _LEFT, _WIDTH - _RIGHT, whole=True)
    y = _axis(extent, _HEIGHT - _BOTTOM, _TOP)
    corners = [(x.at(0), y.at(0))]
    for index, (_, value) in enumerate(ranked):
        corners += [(x.at(index), y.at(value)), (x.at(index + 1), y.at(value))]
    corners.append((x.at(len(ranked)), y.at(0)))
    parts += [
        _frame(x, y, "clients, lowest first", ""),
        _tag("path", d=_path(corners) + "Z", fill="var(--c0)", opacity="0.8"),
    ]
    if pooled is not None:
        at_y = y.at(pooled)
        parts.append(_tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at_y, y2=at_y, class_="mark"))
        parts.append(_tag("text", label, x=_LEFT + 6, y=at_y - 5, class_="over"))
    return _figure(title, caption, told, _HEIGHT, parts, [])


def _scatter(across: Mapping[str, Sequence[float]], up: Mapping[str, Sequence[float]]) -> _Html:
    methods = [method for method in across if across[method] and up.get(method)]
    if not methods:
        return _tag("p", "No method has both values.")
    height = 300
    x = _axis([v for method in methods for v in across[method]], _LEFT, _WIDTH - _RIGHT)
    y = _axis([v for method in methods for v in up[method]], height - _BOTTOM, 26)
    parts = [_frame(x, y, "pooled test NDCG@10", "NDCG@10 of the lowest client")]
    for index, method in enumerate(methods):
        # strict: a method's seeds stand in the same order in both lists.
        parts += [
            _marker(index, x.at(right), y.at(high), 3.5, "0.5", method)
            for right, high in zip(across[method], up[method], strict=True)
        ]
    for index, method in enumerate(methods):
        at = x.at(fmean(across[method])), y.at(fmean(up[method]))
        parts.append(_marker(index, *at, 7, "1", f"{method}, mean"))
    told = "; ".join(
        f"{method}: pooled {_number(fmean(across[method]))}, lowest client "
        f"{_number(fmean(up[method]))}"
        for method in methods
    )
    rows = [
        [method, _number(fmean(across[method])), _number(fmean(up[method])), str(len(up[method]))]
        for method in methods
    ]
    legend = [
        (_marker(index, 13, 6, 5.5, "1", method), method) for index, method in enumerate(methods)
    ]
    return _tag(
        "div",
        _figure(
            "Further right: better overall; further up: better for the worst-served client",
            "Small: one seed; large: the mean",
            told,
            height,
            parts,
            legend,
        ),
        _table(["", "pooled", "lowest client", "seeds"], rows),
        class_="grid",
    )


def _frame(x: _Axis, y: _Axis, across: str, up: str) -> _Html:
    """Grid lines, tick labels and the names of the axes."""
    bottom = max(y.start, y.end)
    parts = []
    for tick in y.ticks:
        parts += [
            _tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y.at(tick), y2=y.at(tick), class_="rule"),
            _tag("text", y.label(tick), x=_LEFT - 5, y=y.at(tick) + 4, text_anchor="end"),
        ]
    parts += [
        _tag("text", x.label(tick), x=x.at(tick), y=bottom + 14, text_anchor="middle")
        for tick in x.ticks
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_tag("text", across, x=middle, y=bottom + 29, text_anchor="middle"))
    if up:
        parts.append(_tag("text", up, x=2, y=11))
    return _join(*parts)


def _figure(
    title: str,
    caption: str,
    told: str,
    height: int,
    parts: Iterable[_Html],
    legend: Sequence[tuple[_Html, str]],
) -> _Html:
    """A chart with its name, its words for those who cannot see it, and its legend."""
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    entries = [
        _tag("li", _tag("svg", drawn, viewBox="0 0 26 12", aria_hidden="true"), " ", words)
        for drawn, words in legend
    ]
    return _tag(
        "figure",
        _tag("figcaption", _tag("b", title), ". ", caption),
        _tag(
            "svg",
            _tag("title", title, id=f"{name}-title"),
            _tag("desc", told, id=f"{name}-desc"),
            *parts,
            viewBox=f"0 0 {_WIDTH} {height}",
            role="img",
            aria_labelledby=f"{name}-title {name}-desc",
        ),
        _tag("ul", *entries, class_="legend") if entries else "",
    )


def _marker(index: int, x: float, y: float, size: float, opacity: str, name: str) -> _Html:
    """A method's sign: its shape tells it apart where colours do not."""
    shapes = (
        [(math.cos(a * math.pi / 8), math.sin(a * math.pi / 8)) for a in range(16)],
        [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        [(0, -1.1), (1, 0.8), (-1, 0.8)],
        [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
        [(0, 1.1), (1, -0.8), (-1, -0.8)],
        [(-1.1, -0.4), (1.1, -0.4), (1.1, 0.4), (-1.1, 0.4)],
    )
    corners = [
        (round(x + dx * size, 2), round(y + dy * size, 2)) for dx, dy in shapes[index % len(shapes)]
    ]
    return _tag(
        "path",
        _tag("title", name),
        d=_path(corners) + "Z",
        fill=f"var(--c{index % 6})",
        opacity=opacity,
    )


def _axis(values: Sequence[float], start: float, end: float, whole: bool = False) -> _Axis:
    """An axis with ticks at 1, 2 or 5 times a power of ten; `whole`: only at whole numbers."""
    low, high = min(values), max(values)
    if low == high:
        room = 0.5 if whole else abs(low) / 10 or 0.5
        low, high = low - room, high + room
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1, round(step))
        ticks = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    else:
        ticks = [
            step * i
            for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
        ]
        low, high = ticks[0], ticks[-1]
    return _Axis(ticks, low, high, start, end)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


# Numbers out of rows, and numbers into words.


def _over(rows: Iterable[Mapping[str, Any]], pick: Callable[[Any], Any]) -> dict[int, float]:
    """round -> the picked value, where there is one."""
    picked = {int(row["round"]): pick(row) for row in rows}
    return {number: float(value) for number, value in picked.items() if value is not None}


def _medians(rows: Iterable[Mapping[str, Any]], key: str) -> dict[int, float]:
    return _over(rows, lambda row: _extreme(row.get(key), median))


def _bands(rows: Iterable[Mapping[str, Any]], key: str) -> dict[int, tuple[float, float]]:
    """round -> lowest and highest client."""
    return {
        int(row["round"]): (min(row[key].values()), max(row[key].values()))
        for row in rows
        if row.get(key)
    }


def _extreme(
    values: Mapping[str, float] | None, choose: Callable[[Iterable[float]], float]
) -> float | None:
    return choose(values.values()) if values else None


def _ordered(names: Iterable[str]) -> list[str]:
    """Metric names by family, then by cutoff; balance and anything else behind."""

    def place(name: str) -> tuple[int, int, str]:
        family, _, cutoff = name.partition("@")
        if family in _FAMILIES and cutoff.isdigit():
            return _FAMILIES.index(family), int(cutoff), ""
        statistic = name.removeprefix("balance/")
        known = list(_STATISTICS)
        return len(_FAMILIES), known.index(statistic) if statistic in known else 99, name

    return sorted(names, key=place)


def _title(metric: str) -> str:
    """A metric's name as the field writes it."""
    family, at, cutoff = metric.partition("@")
    if metric.startswith("balance/"):
        return f"clients: {_STATISTICS.get(metric.removeprefix('balance/'), metric)}"
    return (family.upper() if family in ("ndcg", "mrr") else family.capitalize()) + at + cutoff


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(len(units) - 1, max(0, math.floor(math.log2(count) / 10))) if count >= 1 else 0
    return f"{count / 1024**power:,.{1 if power else 0}f} {units[power]}"


def _sent(count: int | Mapping[str, int] | None) -> str:
    """A round's bytes, given whole or by kind."""
    if count is None:
        return "–"
    return _size(sum(count.values()) if isinstance(count, Mapping) else count)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


# Markup.


def _tag(name: str, *inside: str, **attributes: str | float | None) -> _Html:
    """An element; text inside and attributes are escaped. `class_` is `class`, `_` is `-`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name == "br" else f"{_join(*inside)}</{name}>"
    return _Html(f"<{name}{written}>{end}")


def _join(*parts: str) -> _Html:
    return _Html("".join(part if isinstance(part, _Html) else escape(part) for part in parts))


def _section(title: str, *inside: str) -> _Html:
    return _tag("section", _tag("h2", title), *inside)


def _fold(title: str, *inside: str, opened: bool = False) -> _Html:
    return _tag("details", _tag("summary", title), *inside, open="" if opened else None)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> _Html:
    """A table whose first column names the rows; wide ones scroll by themselves."""
    top = _tag("tr", *(_tag("th", cell, scope="col") for cell in head))
    body = (
        _tag("tr", _tag("th", row[0], scope="row"), *(_tag("td", cell) for cell in row[1:]))
        for row in rows
    )
    # A box that scrolls must be reachable by keyboard.
    return _tag(
        "div",
        _tag("table", _tag("thead", top), _tag("tbody", *body)),
        class_="scroll",
        tabindex="0",
    )


def _facts(facts: Mapping[str, Any]) -> _Html:
    pairs = (_join(_tag("dt", name), _tag("dd", _plain(value))) for name, value in facts.items())
    return _tag("dl", *pairs)


def _page(title: str, *parts: str) -> str:
    head = _join(
        _Html('<meta charset="utf-8">'),
        _Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        # Even a name that slipped through unescaped could load or run nothing.
        _Html(
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        ),
        _tag("title", f"{title} – fellray"),
        _tag("style", _Html(_STYLE)),
    )
    body = _tag("body", _tag("main", *parts))
    return f"<!doctype html>\n{_tag('html', _tag('head', head), body, lang='en')}\n"
