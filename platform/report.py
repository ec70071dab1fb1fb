"""The page that shows one run to a colleague.

Takes plain dicts as they stand in the run's JSON files and gives a string; same input, same bytes.
It must not know where the numbers come from, nor read or write a file. The page needs nothing from
outside: its few charts are inline SVG, each with a table near it.
"""

import json
from collections.abc import Mapping
from typing import Any

from fellray.platform.charts import draw_bars
from fellray.platform.curves import show_rounds
from fellray.platform.markup import Html, fold, make_page, section, tabulate, tag
from fellray.platform.run_sections import (
    show_events,
    show_groups,
    show_head,
    show_privacy,
    show_provenance,
    show_traffic,
)
from fellray.platform.words import (
    BASELINES,
    HEADLINE,
    STATISTICS,
    format_count,
    format_number,
    format_size,
    name_metric,
    order_metrics,
)

_ENDS = 100  # clients listed from either end where there are more than twice as many


def render(
    summary: dict[str, Any],
    metrics: list[dict[str, Any]],
    config: dict[str, Any],
    costs: dict[str, Any] | None,
) -> str:
    """The page of one run.

    Args:
        summary: `run`, `method`, `seed`, `rounds`, `best_round`, `clients` (a count or ids),
            `test` and `validation` (metric -> pooled value), `per_client` (client -> metric ->
            value, and `users`), `balance` (of test NDCG@10), `bytes`, `hashes`, `popularity`,
            `prior`, `untrained` (metric -> test value), `privacy` (as `Spending.tree`), `groups`
            (as `describe_groups`), `data`, `model`, `environment`, `events`.
            What is missing is left out of the page.
        metrics: rows of metrics.jsonl; of several rows of one round the last counts.
        config: the resolved config.
        costs: what `costs.json` holds, None where it was not measured.
    """
    rows = list({row["round"]: row for row in metrics}.values())
    rows.sort(key=lambda row: int(row["round"]))
    return make_page(
        str(summary.get("run", "run")),
        _head(summary),
        _tested(summary),
        show_rounds(summary, rows),
        _clients(summary),
        show_groups(summary),
        show_traffic(summary, rows),
        show_privacy(summary),
        show_events(summary, rows),
        _client_cost(costs) if costs else "",
        show_provenance(summary),
        fold("Resolved config", tag("pre", json.dumps(config, indent=2, default=str))),
    )


def _head(summary: Mapping[str, Any]) -> Html:
    test, balance = summary.get("test") or {}, summary.get("balance") or {}
    clients = summary.get("clients", len(summary.get("per_client") or {}))
    facts = [
        f"method {summary.get('method', '?')}",
        f"seed {summary.get('seed', '?')}",
        format_count(clients if isinstance(clients, int) else len(clients), "client"),
        format_count(summary.get("rounds", 0), "round")
        + (
            f", best round {summary['best_round']}" if summary.get("best_round") is not None else ""
        ),
        f"data {(summary.get('data') or {}).get('path', '?')}",
        f"model {(summary.get('model') or {}).get('name', '?')}",
    ]
    tiles = [
        ("test NDCG@10", test.get(HEADLINE)),
        ("lowest client’s NDCG@10", balance.get("min")),
        ("test Recall@10", test.get("recall@10")),
        ("Jain index of clients", balance.get("jain")),
    ]
    return show_head(str(summary.get("run", "run")), facts, _lead(summary), tiles)


def _lead(summary: Mapping[str, Any]) -> str:
    own = (summary.get("test") or {}).get(HEADLINE)
    if own is None:
        return "This run has no test metrics."
    users = sum(int(row.get("users", 0)) for row in (summary.get("per_client") or {}).values())
    text = f"Test NDCG@10 is {own:.4f}" + (f" over {format_count(users, 'user')}" if users else "")
    rivals = {name: (summary.get(name) or {}).get(HEADLINE) for name in BASELINES}
    known = {name: value for name, value in rivals.items() if value is not None}
    if not known:
        return f"{text}; no baseline was measured."
    name, value = max(known.items(), key=lambda rival: rival[1])
    if format_number(own) == format_number(value):
        distance = "level with"
    elif value == 0:
        distance = "above"
    else:
        distance = f"{abs(own / value - 1):.1%} {'above' if own > value else 'below'}"
    return (
        f"{text}, {distance} the strongest baseline ({name}, {value:.4f}). "
        "One run with one seed: compare seeds before calling it a difference."
    )


def _tested(summary: Mapping[str, Any]) -> Html:
    columns = {"this run": summary.get("test") or {}}
    columns |= {name: summary[name] for name in BASELINES if summary.get(name)}
    validation = summary.get("validation")
    if validation:
        columns["validation"] = validation
    rows = [
        [name_metric(metric), *(format_number(column.get(metric)) for column in columns.values())]
        for metric in order_metrics({metric for column in columns.values() for metric in column})
    ]
    notes = "; ".join(f"{name}: {BASELINES[name]}" for name in columns if name in BASELINES)
    return section(
        "Test metrics",
        tag("p", "Full ranking over all items, seen items masked, averaged over users. ", notes),
        tabulate(["", *columns], rows),
    )


def _clients(summary: Mapping[str, Any]) -> Html:
    per_client = summary.get("per_client") or {}
    if not per_client:
        return Html()
    hashes, balance = summary.get("hashes") or {}, summary.get("balance") or {}
    values = {client: float(row[HEADLINE]) for client, row in per_client.items() if HEADLINE in row}
    ranked = sorted(per_client, key=lambda client: (values.get(client, -1.0), client))
    names = order_metrics({name for row in per_client.values() for name in row} - {"users"})
    names = [name for name in names if name.endswith("@10")] or names
    listed = ranked
    if len(ranked) > 2 * _ENDS:
        listed = ranked[:_ENDS] + ranked[-_ENDS:]
    head = ["client", "users", *map(name_metric, names), *(["adapters"] if hashes else [])]
    rows = [
        [
            client,
            str(per_client[client].get("users", "–")),
            *(format_number(per_client[client].get(name)) for name in names),
            *([str(hashes.get(client, "–"))[:12]] if hashes else []),
        ]
        for client in listed
    ]
    cut = (
        f" (the {_ENDS} lowest and the {_ENDS} highest of {len(ranked)})"
        if listed != ranked
        else ""
    )
    return section(
        "Clients",
        tag(
            "div",
            draw_bars(values, (summary.get("test") or {}).get(HEADLINE)) if values else "",
            tabulate(
                ["NDCG@10 over clients", ""],
                [
                    [words, format_number(balance[key])]
                    for key, words in STATISTICS.items()
                    if key in balance
                ],
            )
            if balance
            else "",
            class_="grid",
        ),
        fold(f"Every client, lowest first{cut}", tabulate(head, rows), opened=len(rows) <= 12),
    )


def _client_cost(costs: Mapping[str, Any]) -> Html:
    """One row per depth of the cut; in brackets the share of the whole model's."""

    def cell(row: Mapping[str, Any], name: str, scale: float, digits: int) -> str:
        value = row[name]["median"] if isinstance(row[name], Mapping) else row[name]
        return f"{value * scale:,.{digits}f} ({row['ratio'][name]:.0%})"

    rows = [
        [
            row["arm"],
            cell(row, "frozen", 1e-6, 1),
            cell(row, "trained", 1e-3, 1),
            cell(row, "peak_bytes", 2**-20, 0),
            cell(row, "model_bytes", 2**-20, 0),
            cell(row, "step_s", 1e3, 0),
            cell(row, "own_s", 1e3, 0),
            format_size(row["bytes"]["median"]),
        ]
        for row in costs["rows"]
    ]
    head = ["client", "frozen, million", "trained, thousand", "peak memory, MiB", "of it model"]
    head += ["step, ms", "own work, ms", "sent a step"]
    words = (
        "What one client needs when k blocks stay with it, beside training the whole model by "
        "itself; in brackets the share of the whole. "
        f"Medians of {costs['turns']} fresh processes, {costs['tokens_per_step']:.0f} tokens a "
        f"step, {format_count(costs['threads'], 'thread')}. A step waits for the server, own work "
        f"does not; {costs['imports_bytes']['median'] / 2**20:.0f} MiB of the peak are code."
    )
    busy = " The machine was busy: read the shares, not the times." if costs["busy"] else ""
    return section("What a client needs", tag("p", words + busy), tabulate(head, rows))
