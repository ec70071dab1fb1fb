"""The part of a run's page about its rounds: curves of what each round measured, and the table.

Takes rows as they stand in metrics.jsonl. It must not know how a chart is drawn.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from fellray.platform.charts import Series, draw_lines
from fellray.platform.markup import Html, fold, section, tabulate, tag
from fellray.platform.words import HEADLINE, format_number, format_size


def show_rounds(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Html:
    """The section of the rounds: curves, and every round's numbers; `rows` by round."""
    if not rows:
        return section("Rounds", tag("p", "No round was trained."))
    best = summary.get("best_round")
    loss = Series("mean loss", _over(rows, lambda row: row.get("loss")), _bands(rows, "losses"))
    pooled = Series("pooled", _over(rows, _validated))
    worst = Series("worst client", _over(rows, lambda row: row.get("worst_ndcg@10")))
    weight, degree = _middle(rows, "own_weight"), _middle(rows, "learning_degree")
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "training loss": lambda row: format_number(row.get("loss")),
        "lowest": lambda row: format_number(_extreme(row.get("losses"), min)),
        "highest": lambda row: format_number(_extreme(row.get("losses"), max)),
        "NDCG@10, pooled": lambda row: format_number(_validated(row)),
        "worst client": lambda row: format_number(row.get("worst_ndcg@10")),
        "own weight": lambda row: format_number(_extreme(row.get("own_weight"), median)),
        "learning degree": lambda row: format_number(_extreme(row.get("learning_degree"), median)),
        "seconds": lambda row: format_number(row.get("seconds"), 1),
        "samples/s": lambda row: format_number(row.get("samples_per_second"), 1),
        "moved": lambda row: _moved(row.get("bytes")),
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = {name: column for name, column in cells.items() if set(column) != {"–"}}
    return section(
        "Rounds",
        tag(
            "div",
            draw_lines("Training loss", "Mean over clients by round", [loss]),
            draw_lines("Validation NDCG@10", "Full ranking, by round", [pooled, worst], best),
            draw_lines("Own weight", "Share of a client’s own adapters in its mixture", [weight]),
            draw_lines(
                "Learning degree", "How far a client takes the others in (0 to 1)", [degree]
            ),
            class_="grid",
        ),
        fold(
            "The numbers of every round",
            tabulate(
                ["round", *shown],
                [
                    [str(row["round"]), *(column[index] for column in shown.values())]
                    for index, row in enumerate(rows)
                ],
            ),
            opened=len(rows) <= 12,
        ),
    )


def _over(rows: Iterable[Mapping[str, Any]], pick: Callable[[Any], Any]) -> dict[int, float]:
    """round -> the picked value, where there is one."""
    picked = {int(row["round"]): pick(row) for row in rows}
    return {number: float(value) for number, value in picked.items() if value is not None}


def _validated(row: Mapping[str, Any]) -> float | None:
    value: float | None = (row.get("validation") or {}).get(HEADLINE)
    return value


def _middle(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    """The median client's line in the band of all."""
    medians = _over(rows, lambda row: _extreme(row.get(key), median))
    return Series("median client", medians, _bands(rows, key))


def _bands(rows: Iterable[Mapping[str, Any]], key: str) -> dict[int, tuple[float, float]]:
    """round -> lowest and highest client."""
    bands = {}
    for row in rows:
        values = _known(row.get(key))
        if len(values) > 1:
            bands[int(row["round"])] = (min(values), max(values))
    return bands


def _extreme(
    values: Mapping[str, float | None] | None, choose: Callable[[Iterable[float]], float]
) -> float | None:
    known = _known(values)
    return choose(known) if known else None


def _known(values: Mapping[str, float | None] | None) -> list[float]:
    """A refused client's loss is no number and stands as null."""
    return [value for value in (values or {}).values() if value is not None]


def _moved(count: int | Mapping[str, int] | None) -> str:
    """A round's bytes, given whole or by kind."""
    if count is None:
        return "–"
    return format_size(sum(count.values()) if isinstance(count, Mapping) else count)
