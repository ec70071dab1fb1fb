"""A finished run on attributes in numbers: its summary, and the table on the terminal."""

from collections import Counter
from typing import Any

from rich.table import Table

from fellray.actors.attribute_client import PRIVATE
from fellray.actors.attribute_plant import AttributePlant
from fellray.actors.attribute_world import AttributeWorld
from fellray.jobs.display import console
from fellray.platform.attribute_model import describe_backbone
from fellray.platform.click_score import pool_clicks
from fellray.platform.clicks import TEST, VALID
from fellray.platform.environment import environment
from fellray.platform.fedpa import GROUP
from fellray.platform.ledger import total
from fellray.platform.messages import LedgerRow
from fellray.platform.outcome import pool
from fellray.platform.run import Run
from fellray.platform.words import CLICK_METRICS


def summarise_attributes(plant: AttributePlant, run: Run, world: AttributeWorld) -> dict[str, Any]:
    """A run in numbers, its best round tested."""
    config, best, last = run.config, run.best_round(), run.rounds.latest() or 0
    ledger = [
        LedgerRow(**{k: v for k, v in row.items() if k != "round"})
        for row in run.journal.rows("ledger")
    ]
    test, untrained = plant.evaluate(best, TEST), plant.evaluate(0, TEST)
    return {
        "run": config.name,
        "method": config.method.kind,
        "seed": config.seed,
        "rounds": last,
        "best_round": best,
        "clients": len(plant.learners),
        "test": pool(test),
        "validation": pool(plant.evaluate(best, VALID)),
        "untrained": pool(untrained),
        "reliability": {
            name: pool_clicks([scores[actor] for actor in sorted(scores)]).reliability()
            for name, scores in (("test", test), ("untrained", untrained))
        },
        "counts": world.layout.count(),
        "adapter_norms": plant.measure_adapters(best),
        "groups": {a: len(set(names)) for a, names in world.groups.items()},
        "group_sizes": {
            a: {name.removeprefix(f"{GROUP}{a}"): n for name, n in sorted(Counter(names).items())}
            for a, names in world.groups.items()
        },
        "bytes": total(ledger),
        "privacy": run.spending.tree(),
        "hashes": run.rounds.hashes(best, [PRIVATE], plant.learners),
        "shared_hash": plant.hash_shared(best),
        "final_hashes": run.rounds.hashes(last, [PRIVATE], plant.learners),
        "final_shared_hash": plant.hash_shared(last),
        "data": {
            "path": str(config.data.path),
            "sha256": world.data_sha256,
            "counts": world.manifest["counts"],
        },
        "model": {"name": "attributes", **describe_backbone(world.backbone.shape)},
        "environment": environment(),
        "events": [e for row in run.journal.rows("metrics") for e in row["events"]] + run.events,
    }


def show_attributes(summary: dict[str, Any]) -> None:
    """The test table of a run: the method beside the rows that it must be read beside."""
    table = Table(
        "test", *CLICK_METRICS, title=f"{summary['run']} (best round {summary['best_round']})"
    )
    for row in ("untrained", "embedding_only", "test"):
        if values := summary.get(row):
            name = summary["method"] if row == "test" else row.replace("_", " ")
            table.add_row(name, *(f"{values[m]:.4f}" if m in values else "" for m in CLICK_METRICS))
    console.print(table)
    norms = [f"{name} {value:.3g}" for name, value in summary["adapter_norms"].items()]
    console.print(f"largest norms of any adapter: {', '.join(norms)}")
    beside = summary.get("embedding_only", {}).get("auc", 0.0)
    if beside >= summary["test"]["auc"]:
        console.print("User embeddings alone, with nothing sent, do as well on this data.")
