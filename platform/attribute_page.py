"""The page that shows a run on attributes: clicks foretold, adapters, groups.

Takes plain dicts as they stand in the run's JSON files and gives a string; same input, same bytes.
It must not know where the numbers come from, nor read or write a file.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fellray.platform.calibration_plot import draw_calibration
from fellray.platform.charts import Series, draw_lines
from fellray.platform.click_score import CALIBRATION
from fellray.platform.fedpa import OTHER
from fellray.platform.markup import Html, fold, join, make_page, section, tabulate, tag
from fellray.platform.run_sections import (
    show_events,
    show_head,
    show_privacy,
    show_provenance,
    show_traffic,
)
from fellray.platform.words import (
    CLICK_METRICS,
    CLICK_ROWS,
    format_count,
    format_number,
    format_size,
    name_metric,
)

_KEPT = "A user's own rows and adapters are in no message."
_TOLD = (
    "an evaluation tells how many clicks of an actor's clients, taken together, fell into each bin "
    "of probability"
)
_MANY = 12  # groups of an attribute that are shown unfolded


def render_attributes(
    summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> str:
    """The page of one run on attributes.

    Args:
        summary: as `jobs.attribute_summary` gives it, with `embedding_only` where
            that was trained.
        metrics: rows of metrics.jsonl; of several rows of one round the last counts.
        config: the resolved config.
    """
    rows = sorted({row["round"]: row for row in metrics}.values(), key=lambda row: row["round"])
    return make_page(
        str(summary["run"]),
        _head(summary),
        _tested(summary),
        _rounds(summary, rows),
        _calibration(summary.get("reliability") or {}),
        _adapters(summary),
        _groups(summary.get("group_sizes") or {}),
        show_traffic(summary, rows, _tell_sent(summary)),
        _privacy(summary),
        show_events(summary, rows),
        show_provenance(summary),
        fold("Resolved config", tag("pre", json.dumps(config, indent=2, default=str))),
    )


def _head(summary: Mapping[str, Any]) -> Html:
    test, beside = summary["test"], summary.get("embedding_only") or {}
    facts = [
        f"method {summary['method']}",
        f"seed {summary['seed']}",
        format_count(summary["clients"], "client"),
        f"{format_count(summary['rounds'], 'round')}, best round {summary['best_round']}",
        f"data {summary['data']['path']}",
    ]
    tiles = [
        ("test AUC", test.get("auc")),
        ("AUC of user embeddings alone", beside.get("auc")),
        ("test GAUC", test.get("gauc")),
        ("GAUC before round 1", summary["untrained"].get("gauc")),
    ]
    return show_head(str(summary["run"]), facts, _lead(summary), tiles)


def _lead(summary: Mapping[str, Any]) -> str:
    own = summary["test"].get("auc")
    if own is None:
        return "The test has no AUC: all of its samples are of one kind."
    parts = [f"Test AUC is {own:.4f}"]
    for row, words in CLICK_ROWS.items():
        value = (summary.get(row) or {}).get("auc")
        if value is not None:
            same = format_number(own) == format_number(value)
            how = "level with" if same else f"{own - value:+.4f} against"
            parts.append(f"{how} {words} ({value:.4f})")
    text = ", ".join(parts) + "."
    gauc, start = summary["test"].get("gauc"), summary["untrained"].get("gauc")
    if gauc is not None and start is not None and gauc <= start:
        text += (
            " A user's own items are ranked no better than before training (GAUC): what grew, if "
            "anything, is knowing who clicks much."
        )
    return text + " One run with one seed: compare seeds before calling it a difference."


def _tested(summary: Mapping[str, Any]) -> Html:
    columns = {"this run": summary["test"]}
    columns |= {row.replace("_", " "): summary[row] for row in CLICK_ROWS if summary.get(row)}
    columns["validation"] = summary["validation"]
    rows = [
        [name_metric(metric), *(format_number(column.get(metric)) for column in columns.values())]
        for metric in CLICK_METRICS
    ]
    notes = "; ".join(f"{row.replace('_', ' ')}: {words}" for row, words in CLICK_ROWS.items())
    meanings = "; ".join(f"{name_metric(m)}: {words}" for m, words in CLICK_METRICS.items())
    return section(
        "Test metrics",
        tag("p", f"Each client's newest interactions, all clients' together. {notes}."),
        tabulate(["", *columns], rows),
        tag("p", f"{meanings}.", class_="soft"),
    )


def _rounds(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Html:
    if not rows:
        return section("Rounds", tag("p", "No round was trained."))
    best = summary["best_round"]

    def pick(metric: str) -> dict[int, float]:
        found = {row["round"]: (row.get("validation") or {}).get(metric) for row in rows}
        return {number: value for number, value in found.items() if value is not None}

    losses = {row["round"]: row["loss"] for row in rows if row.get("loss") is not None}
    table = [
        [
            str(row["round"]),
            format_number(row.get("loss")),
            *(format_number((row.get("validation") or {}).get(m)) for m in ("auc", "gauc")),
            format_number(row.get("seconds"), 1),
            format_size(row.get("bytes") or 0),
        ]
        for row in rows
    ]
    head = ["round", "training loss", "AUC, validation", "GAUC, validation", "seconds", "moved"]
    return section(
        "Rounds",
        tag(
            "div",
            draw_lines("Validation AUC", "All samples", [Series("AUC", pick("auc"))], best),
            draw_lines("Validation GAUC", "Users’ own", [Series("GAUC", pick("gauc"))], best),
            draw_lines("Training loss", "Mean over clients", [Series("mean loss", losses)]),
            class_="grid",
        ),
        fold("The numbers of every round", tabulate(head, table), opened=len(rows) <= 12),
    )


def _calibration(reliability: Mapping[str, Sequence[Mapping[str, float]]]) -> Html:
    curves = {
        "this run" if row == "test" else row.replace("_", " "): bins
        for row, bins in reliability.items()
    }
    if not any(curves.values()):
        return Html()
    places = [{int(one["foretold"] * CALIBRATION): one for one in v} for v in curves.values()]
    rows = []
    for at in sorted(set().union(*places)):
        cells = [f"{at / CALIBRATION:.1f}–{(at + 1) / CALIBRATION:.1f}"]
        for place in places:
            one = place.get(at)
            cells += [f"{one['clicked']:.4f}", f"{one['samples']:,.0f}"] if one else ["–", "0"]
        rows.append(cells)
    heads = [cell for name in curves for cell in (f"clicked, {name}", "samples")]
    return section(
        "Calibration",
        tag(
            "div",
            draw_calibration(curves),
            tabulate(["probability", *heads], rows),
            class_="grid",
        ),
    )


def _adapters(summary: Mapping[str, Any]) -> Html:
    norms: Mapping[str, float] = summary.get("adapter_norms") or {}
    if not norms:
        return Html()
    names = sorted({name.rpartition(".")[0] for name in norms})
    words = "The largest norm that any client's adapter has in the best round, over layers."
    products = [norms.get(f"{name}.B", 0.0) for name in names]
    if not any(products):
        words += " Every B is zero: no adapter does anything."
    rows = [[name, *(f"{norms.get(f'{name}.{side}', 0.0):.4g}" for side in "AB")] for name in names]
    return section("Adapters", tag("p", words), tabulate(["adapter", "A", "B"], rows))


def _groups(sizes: Mapping[str, Mapping[str, int]]) -> Html:
    if not sizes:
        return Html()
    tables = []
    for attribute, members in sizes.items():
        rows = [[_name_group(name), f"{count:,}"] for name, count in members.items()]
        table = tabulate(["group", "clients"], rows)
        title = f"{attribute}: {format_count(len(rows), 'group')}"
        tables.append(fold(title, table, opened=len(rows) <= _MANY))
    words = "Clients with one value of an attribute; values that too few have are one group."
    return section("Groups", tag("p", words), tag("div", *tables, class_="grid"))


def _name_group(name: str) -> str:
    return "all others" if name == OTHER else name.removeprefix("=") or "(no value)"


def _tell_sent(summary: Mapping[str, Any]) -> str:
    """What goes up and down, by what the run's privacy does to it."""
    privacy = summary.get("privacy") or {}
    noised = {
        "gaussian": "clipped and noised, and its loss noised"
        if privacy.get("loss_clip") is not None
        else "clipped and noised, and no loss",
        "paper_like": "with noise, and its loss without",
    }
    how = noised.get(privacy.get("mechanism", "none"), "as it trained them, and its loss")
    return (
        f"Each client sends up its groups' adapters, the gate and the output layer {how}; what was "
        "averaged comes down, also for an evaluation."
    )


def _privacy(summary: Mapping[str, Any]) -> Html:
    if noised := show_privacy(summary):
        bare = f"Noise is on what training sends and on nothing else: {_TOLD}, as it is."
        return join(noised, tag("p", f"{_KEPT} {bare}"))
    words = (
        f"Nothing was noised, so there is no epsilon. {_KEPT} What is sent follows from private "
        f"data and is not protected further; {_TOLD}."
    )
    return section("Privacy", tag("p", words))
