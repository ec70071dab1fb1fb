"""How well a round serves each client: NDCG@10 as the run measured it itself.

It must not know who asks, nor compute anything anew.
"""

from collections.abc import Mapping
from typing import Literal

from fellray.platform.errors import FellrayError
from fellray.platform.run import Run
from fellray.serve.served import Served

SUMMARY = "summary.json"


def read_quality(
    run: Run, served: Served
) -> tuple[Literal["test", "valid"] | None, Mapping[str, float]]:
    """The split, and client -> NDCG@10: the test where the summary is about this round.

    Else the round's validation; None and nothing where it was not validated.
    """
    try:
        summary = run.read_json(SUMMARY) if run.storage.exists(SUMMARY) else {}
        if summary.get("best_round") == served.round:
            rows = summary["per_client"].items()
            return "test", {client: float(row["ndcg@10"]) for client, row in rows}
    except (FellrayError, AttributeError, KeyError, TypeError, ValueError):
        pass  # the report is not what is served: without it there is the validation
    return ("valid", served.validation) if served.validation else (None, {})
