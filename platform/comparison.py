"""The page that sets methods side by side.

Takes plain dicts as they stand in compare.json and gives a string; same input, same bytes. It must
not know where the numbers come from, nor read or write a file.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fellray.platform.charts import draw_scatter
from fellray.platform.markup import Html, fold, join, list_facts, make_page, section, tabulate, tag
from fellray.platform.words import (
    BASELINES,
    HEADLINE,
    ORIENTATION,
    STATISTICS,
    format_count,
    format_number,
    name_metric,
    order_metrics,
)

_UNRANKED = BASELINES.keys() | ORIENTATION.keys()
_LESS_IS_BETTER = ("balance/std", "balance/cv", "balance/max_min")


def render_comparison(
    compare: dict[str, Any], balances: dict[str, Any], meta: dict[str, Any]
) -> str:
    """The page that sets methods side by side.

    Args:
        compare: method -> metric -> {`mean`, `std`, `values` (one per seed)}, test metrics and
            `balance/min` and the like (of NDCG@10). Rows named `popularity`, `prior` and
            `untrained` are baselines, those of `words.ORIENTATION` are trained where all data lie
            together: shown, but not ranked among the methods.
        balances: method -> seed -> statistic -> value, as `metrics.balance` gives it; may be empty.
        meta: `name` and `seeds`; everything else in it is listed as it is.
    """
    lowest = {
        method: table["balance/min"]["values"]
        if "balance/min" in table
        else [seed["min"] for seed in balances.get(method, {}).values()]
        for method, table in compare.items()
    }
    pooled = {method: table[HEADLINE]["values"] for method, table in compare.items()}
    methods = [name for name in compare if name not in _UNRANKED]
    rest = {name: value for name, value in meta.items() if name != "name"}
    by_seed = [
        [f"{method}, seed {seed}", *(format_number(values.get(key)) for key in STATISTICS)]
        for method, seeds in balances.items()
        for seed, values in seeds.items()
    ]
    return make_page(
        str(meta.get("name", "Comparison")),
        tag("h1", str(meta.get("name", "Comparison"))),
        tag("p", f"{format_count(len(methods), 'method')}: {', '.join(methods)}", class_="soft"),
        tag("p", _verdict("Pooled test NDCG@10", pooled), class_="lead"),
        tag("p", _verdict("NDCG@10 of the lowest client", lowest), class_="lead"),
        section("Overall against the lowest client", draw_scatter(pooled, lowest)),
        section("All metrics", _side_by_side(compare)),
        fold("Balance of NDCG@10 by seed", tabulate(["", *STATISTICS.values()], by_seed))
        if by_seed
        else "",
        section("What was compared", list_facts(rest)) if rest else "",
    )


def _verdict(what: str, values: Mapping[str, Sequence[float]]) -> str:
    """Which method is best in the mean, whether the spread overlaps, and the best baseline."""
    means = {name: fmean(own) for name, own in values.items() if own}
    ranked = sorted(means.keys() - _UNRANKED, key=lambda name: (-means[name], name))
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
    baselines = sorted(means.keys() & BASELINES.keys(), key=lambda name: (-means[name], name))
    if baselines:
        above = sum(means[name] > means[baselines[0]] for name in ranked)
        text += (
            f" Strongest baseline: {baselines[0]}, {means[baselines[0]]:.4f}; "
            f"{above} of {len(ranked)} methods are above it in the mean."
        )
    central = sorted(means.keys() & ORIENTATION.keys(), key=lambda name: (-means[name], name))
    if central:
        above = sum(means[name] > means[central[0]] for name in ranked)
        text += (
            " For orientation, trained on everybody’s data in one place, which no method may do: "
            + ", ".join(f"{name} {means[name]:.4f}" for name in central)
            + f"; {above} of {len(ranked)} methods are above the best of them in the mean."
        )
    return text


def _side_by_side(compare: Mapping[str, Any]) -> Html:
    means, seeds = [], []
    for metric in order_metrics({metric for table in compare.values() for metric in table}):
        known = {method: table[metric] for method, table in compare.items() if metric in table}
        best = None
        if len(known) > 1 and not metric.startswith("coverage"):
            choose = min if metric in _LESS_IS_BETTER else max
            best = choose(float(cell["mean"]) for cell in known.values())
        means.append([name_metric(metric)])
        seeds.append([name_metric(metric)])
        for method in compare:
            cell = known.get(method)
            text = _spread(cell) if cell else "–"
            means[-1].append(tag("b", text) if cell and cell["mean"] == best else text)
            seeds[-1].append(" ".join(map(format_number, cell["values"])) if cell else "–")
    note = (
        "Mean ± standard deviation over seeds. Bold: the best mean of the row, which alone proves "
        "no difference. Coverage is neither better high nor low."
    )
    return join(
        tag("p", note),
        tabulate(["", *compare], means),
        fold("Every seed’s value", tabulate(["", *compare], seeds)),
    )


def _spread(cell: Mapping[str, Any]) -> str:
    """Mean and deviation; one seed has none."""
    alone = len(cell["values"]) == 1
    return format_number(cell["mean"]) + ("" if alone else f" ± {format_number(cell['std'])}")
