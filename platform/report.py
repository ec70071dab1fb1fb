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
from itertools import accumulate
from statistics import fmean, median
from typing import Any
from unicodedata import east_asian_width

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
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 212, 46, 20, 12, 36  # of a chart
_SHAPES: Sequence[Sequence[tuple[float, float]]] = (
    [(math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)) for turn in range(16)],
    [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    [(0, -1.1), (1, 0.8), (-1, 0.8)],
    [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    [(0, 1.1), (1, -0.8), (-1, -0.8)],
    [(-1.1, -0.4), (1.1, -0.4), (1.1, 0.4), (-1.1, 0.4)],
)

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
            `balance/min` and the like (of NDCG@10). Rows named `popularity`, `prior` and
            `untrained` are baselines: shown, but not ranked among the methods.
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
    methods = [name for name in compare if name not in _BASELINES]
    rest = {name: value for name, value in meta.items() if name != "name"}
    by_seed = [
        [f"{method}, seed {seed}", *(_number(values.get(key)) for key in _STATISTICS)]
        for method, seeds in balances.items()
        for seed, values in seeds.items()
    ]
    return _page(
        str(meta.get("name", "Comparison")),
        _tag("h1", str(meta.get("name", "Comparison"))),
        _tag("p", f"{_count(len(methods), 'method')}: {', '.join(methods)}", class_="soft"),
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
        columns["validation"] = validation
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
        "moved": lambda row: _moved(row.get("bytes")),
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = {name: column for name, column in cells.items() if set(column) != {"–"}}
    return _section(
        "Rounds",
        _tag(
            "div",
            _lines("Training loss", "Mean over clients by round", [loss], None),
            _lines("Validation NDCG@10", "Full ranking, by round", [pooled, worst], best),
            _lines("Own weight", "Share of a client’s own adapters in its mixture", [weight], None),
            _lines(
                "Learning degree", "How far a client takes the others in (0 to 1)", [degree], None
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
        f"round {row['round']}: {client} refused: {reason}"
        for row in rows
        for client, reason in sorted((row.get("refused") or {}).items())
    ]
    events += [str(event) for event in summary.get("events") or []]
    events = list(dict.fromkeys(events))  # a refusal may stand in both
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
    """Which method is best in the mean, whether the spread overlaps, and the best baseline."""
    means = {name: fmean(own) for name, own in values.items() if own}
    ranked = sorted(means.keys() - _BASELINES.keys(), key=lambda name: (-means[name], name))
    if len(ranked) < 2:
        return f"{what}: fewer than two methods were measured, so there is nothing to compare."
    best, second = ranked[:2]
    seeds = [len(values[name]) for name in ranked]
    level = [name for name in ranked[1:] if max(values[name]) >= min(values[best])]
    text = f"{what}: {best} has the highest mean, {means[best]:.4f}"
    after = f"(next: {second}, {means[second]:.4f})"
    if min(seeds) == 1:
        text += (
            f" {after}. A method with a single seed shows no spread, so this is not yet evidence "
            "of a difference."
        )
    elif level:
        text += (
            f" over {seeds[0]} seeds. The spread overlaps with that of {', '.join(level)}: these "
            "seeds do not tell them apart."
        )
    else:
        text += (
            f" over {seeds[0]} seeds. The spread does not overlap: its worst seed is above the "
            f"best seed of every other method {after}."
        )
    baselines = sorted(means.keys() & _BASELINES.keys(), key=lambda name: (-means[name], name))
    if baselines:
        above = sum(means[name] > means[baselines[0]] for name in ranked)
        text += (
            f" Strongest baseline: {baselines[0]}, {means[baselines[0]]:.4f}; "
            f"{above} of {len(ranked)} methods are above it in the mean."
        )
    return text


def _side_by_side(compare: Mapping[str, Any]) -> _Html:
    means, seeds = [], []
    for metric in _ordered({metric for table in compare.values() for metric in table}):
        known = {method: table[metric] for method, table in compare.items() if metric in table}
        best = None
        if len(known) > 1 and not metric.startswith("coverage"):
            choose = min if metric in _LESS_IS_BETTER else max
            best = choose(float(cell["mean"]) for cell in known.values())
        means.append([_title(metric)])
        seeds.append([_title(metric)])
        for method in compare:
            cell = known.get(method)
            text = _spread(cell) if cell else "–"
            means[-1].append(_tag("b", text) if cell and cell["mean"] == best else text)
            seeds[-1].append(" ".join(map(_number, cell["values"])) if cell else "–")
    note = (
        "Mean ± standard deviation over seeds. Bold: the best mean of the row, which alone proves "
        "no difference. Coverage is neither better high nor low."
    )
    return _join(
        _tag("p", note),
        _table(["", *compare], means),
        _fold("Every seed’s value", _table(["", *compare], seeds)),
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
    parts, legend, told = [_frame(x, y, "round", "")], [], []
    if best is not None and rounds[0] <= best <= rounds[-1]:
        at, left = x.at(best), x.at(best) > _WIDTH / 2
        parts += [
            _line(at, _TOP, at, _HEIGHT - _BOTTOM, class_="mark"),
            _text(f"best round {best}", at + (-4 if left else 4), _TOP + 9, "end" if left else ""),
        ]
    for index, one in enumerate(series):
        look = {"stroke": f"var(--c{index})", "stroke_dasharray": "5 3" if index else None}
        legend.append((_line(0, 6, 26, 6, stroke_width=2, **look), one.name))
        if one.band:
            # The outline keeps a band of a single round visible.
            shade = {"fill": look["stroke"], "stroke": look["stroke"], "opacity": "0.16"}
            upper = [(x.at(number), y.at(high)) for number, (_, high) in one.band.items()]
            lower = [(x.at(number), y.at(low)) for number, (low, _) in one.band.items()]
            parts.append(_tag("path", d=_path(upper + lower[::-1]) + "Z", **shade))
            block = _tag("rect", x=3, y=0, width=20, height=12, **shade)
            legend.append((block, "lowest to highest client"))
        points = [(x.at(number), y.at(value)) for number, value in one.points.items()]
        parts.append(_tag("path", d=_path(points), class_="line", **look))
        if len(points) <= 30:
            parts += [
                _tag(
                    "circle",
                    _tag("title", f"round {number}: {_number(value)}"),
                    cx=x.at(number),
                    cy=y.at(value),
                    r=3,
                    fill=look["stroke"],
                )
                for number, value in one.points.items()
            ]
        first, last, values = min(one.points), max(one.points), one.points.values()
        told.append(
            f"{one.name} from {_number(one.points[first])} in round {first} to "
            f"{_number(one.points[last])} in round {last}, lowest {_number(min(values))}, "
            f"highest {_number(max(values))}"
        )
    return _figure(title, caption, "; ".join(told), _HEIGHT, parts, legend)


def _bars(values: Mapping[str, float], pooled: float | None) -> _Html:
    """Sorted values: a bar with a name each for few clients, one silhouette for many."""
    ranked = sorted(values.items(), key=lambda pair: (pair[1], pair[0]))
    (worst, low), (best, high) = ranked[0], ranked[-1]
    told = (
        f"{_count(len(ranked), 'client')}; lowest {worst} with {_number(low)}, median "
        f"{_number(median(values.values()))}, highest {best} with {_number(high)}; pooled over "
        f"all users {_number(pooled)}"
    )
    extent = [0.0, max(high, pooled or 0.0) or 1.0]
    draw = _named_bars if len(ranked) <= _FEW else _silhouette
    parts, height = draw(ranked, extent, pooled)
    return _figure("Test NDCG@10 by client", "Lowest first", told, height, parts, [])


def _named_bars(
    ranked: Sequence[tuple[str, float]], extent: Sequence[float], pooled: float | None
) -> tuple[list[_Html], int]:
    top, step, left = 22, 18, 104
    height = top + step * len(ranked) + 4
    x = _axis(extent, left, _WIDTH - 44)
    parts, values = [], []
    for index, (client, value) in enumerate(ranked):
        at = top + step * index
        long = max(0.5, round(x.at(value) - left, 2))
        told = _tag("title", f"{client}: {_number(value)}")
        look: dict[str, str | float] = {
            "width": long,
            "height": step - 5,
            "rx": 2,
            "fill": "var(--c0)",
        }
        parts += [
            _text(_short(client), left - 6, at + 12, "end"),
            _tag("rect", told, x=left, y=at + 2, **look),
        ]
        values.append(_text(_number(value), left + long + 4, at + 12))
    if pooled is not None:
        parts += [
            _line(x.at(pooled), top - 4, x.at(pooled), height, class_="mark"),
            _text(f"pooled {_number(pooled)}", x.at(pooled), 12, "middle"),
        ]
    return parts + values, height


def _silhouette(
    ranked: Sequence[tuple[str, float]], extent: Sequence[float], pooled: float | None
) -> tuple[list[_Html], int]:
    x = _axis([0, len(ranked)], _LEFT, _WIDTH - _RIGHT, whole=True)
    y = _axis(extent, _HEIGHT - _BOTTOM, _TOP)
    corners = [(x.at(0), y.at(0))]
    for index, (_, value) in enumerate(ranked):
        corners += [(x.at(index), y.at(value)), (x.at(index + 1), y.at(value))]
    corners.append((x.at(len(ranked)), y.at(0)))
    parts = [
        _frame(x, y, "clients, lowest first", ""),
        _tag("path", d=_path(corners) + "Z", fill="var(--c0)", opacity="0.8"),
    ]
    if pooled is not None:
        at = y.at(pooled)
        parts += [
            _line(_LEFT, at, _WIDTH - _RIGHT, at, class_="mark"),
            _text(f"pooled {_number(pooled)}", _LEFT + 6, at - 5),
        ]
    return parts, _HEIGHT


def _scatter(across: Mapping[str, Sequence[float]], up: Mapping[str, Sequence[float]]) -> _Html:
    methods = [method for method in across if across[method] and up.get(method)]
    if not methods:
        return _tag("p", "No method has both values.")
    height = 300
    x = _axis([v for method in methods for v in across[method]], _LEFT, _WIDTH - _RIGHT)
    y = _axis([v for method in methods for v in up[method]], height - _BOTTOM, 26)
    seeds, means, legend, rows = [], [], [], []
    for index, method in enumerate(methods):
        # strict: a method's seeds stand in the same order in both lists.
        seeds += [
            _marker(index, x.at(right), y.at(high), 3.5, "0.5", method)
            for right, high in zip(across[method], up[method], strict=True)
        ]
        right, high = fmean(across[method]), fmean(up[method])
        means.append(_marker(index, x.at(right), y.at(high), 7, "1", f"{method}, mean"))
        legend.append((_marker(index, 13, 6, 5.5, "1", method), method))
        rows.append([method, _number(right), _number(high), str(len(up[method]))])
    told = "; ".join(f"{row[0]}: pooled {row[1]}, lowest client {row[2]}" for row in rows)
    frame = _frame(x, y, "pooled test NDCG@10", "NDCG@10 of the lowest client")
    title = "Further right: better overall; further up: better for the worst-served client"
    caption = "Small: one seed; large: the mean"
    return _tag(
        "div",
        _figure(title, caption, told, height, [frame, *seeds, *means], legend),
        _table(["", "pooled", "lowest client", "seeds"], rows),
        class_="grid",
    )


def _frame(x: _Axis, y: _Axis, across: str, up: str) -> _Html:
    """Grid lines, tick labels and the names of the axes."""
    bottom = max(y.start, y.end)
    parts = [_text(across, (_LEFT + _WIDTH - _RIGHT) / 2, bottom + 31, "middle"), _text(up, 2, 11)]
    for tick in y.ticks:
        parts.append(_line(_LEFT, y.at(tick), _WIDTH - _RIGHT, y.at(tick), class_="rule"))
        parts.append(_text(y.label(tick), _LEFT - 5, y.at(tick) + 4, "end"))
    parts += [_text(x.label(tick), x.at(tick), bottom + 17, "middle") for tick in x.ticks]
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
    corners = _SHAPES[index % len(_SHAPES)]
    path = _path([(round(x + dx * size, 2), round(y + dy * size, 2)) for dx, dy in corners])
    colour = f"var(--c{index % len(_SHAPES)})"
    return _tag("path", _tag("title", name), d=path + "Z", fill=colour, opacity=opacity)


def _line(x1: float, y1: float, x2: float, y2: float, **look: str | float | None) -> _Html:
    return _tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **look)


def _text(words: str, x: float, y: float, anchor: str = "") -> _Html:
    return _tag("text", words, x=x, y=y, text_anchor=anchor or None)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


def _short(name: str) -> str:
    """A name that fits beside its bar; East Asian letters are twice as wide."""
    widths = accumulate(2 if east_asian_width(letter) in "WF" else 1 for letter in name)
    fits = sum(width <= 14 for width in widths)
    return name if fits == len(name) else name[: fits - 1] + "…"


def _axis(values: Sequence[float], start: float, end: float, whole: bool = False) -> _Axis:
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
    return _Axis([step * number for number in range(first, last + 1)], low, high, start, end)


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
        if len(row.get(key) or ()) > 1
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


def _spread(cell: Mapping[str, Any]) -> str:
    """Mean and deviation; one seed has none."""
    alone = len(cell["values"]) == 1
    return _number(cell["mean"]) + ("" if alone else f" ± {_number(cell['std'])}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(len(units) - 1, max(0, math.floor(math.log2(count) / 10))) if count >= 1 else 0
    return f"{count / 1024**power:,.{1 if power else 0}f} {units[power]}"


def _moved(count: int | Mapping[str, int] | None) -> str:
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
    return _Html(f"<{name}{written}>{_join(*inside)}</{name}>")


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
