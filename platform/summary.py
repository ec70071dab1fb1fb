"""A run's summary: what it came to, in numbers and hashes. It must not know how it is trained."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fellray.platform.bank import state_names
from fellray.platform.environment import environment
from fellray.platform.ledger import total
from fellray.platform.messages import LedgerRow
from fellray.platform.metrics import Score, balance
from fellray.platform.outcome import BALANCED, pool
from fellray.platform.run import Run

HASHED = [*state_names("client", False), *state_names("trunk", False)]
"""What a client's adapter hash is taken of."""


def summarise(
    run: Run,
    learners: Sequence[str],
    data: Mapping[str, Any],
    model_sha256: str,
    test: Mapping[str, Score],
    validation: Mapping[str, Score],
    untrained: Mapping[str, Score],
    baselines: Mapping[str, Mapping[str, Score]],
) -> dict[str, Any]:
    """The run in numbers: what `summary.json` holds (its keys are stable)."""
    best = run.best_round()
    rows = run.journal.rows("ledger")
    ledger = [LedgerRow(**{k: v for k, v in row.items() if k != "round"}) for row in rows]
    per_client = {c: {"users": s.users, **s.means()} for c, s in sorted(test.items())}
    config = run.config
    return {
        "run": config.name,
        "method": config.method.kind,
        "seed": config.seed,
        "rounds": run.rounds.latest() or 0,
        "best_round": best,
        "clients": len(test),
        "test": pool(test),
        "validation": pool(validation),
        "per_client": per_client,
        "balance": balance({c: m[BALANCED] for c, m in per_client.items() if BALANCED in m}),
        "bytes": total(ledger),
        "privacy": run.spending.tree(),
        "hashes": run.rounds.hashes(best, HASHED, learners),
        "shared_hash": _hash_shared(run, best),
        "final_hashes": run.rounds.hashes(run.rounds.latest() or 0, HASHED, learners),
        **{name: pool(scores) for name, scores in baselines.items()},
        "untrained": pool(untrained),
        "data": dict(data),
        "model": {"name": config.model.name, "sha256": model_sha256},
        "environment": environment(),
        "events": [e for row in run.journal.rows("metrics") for e in row["events"]] + run.events,
    }


def _hash_shared(run: Run, round: int) -> str | None:
    """Of the trunk adapter that belongs to all clients; None where the run has none."""
    if not run.config.server.shared_adapter:
        return None
    values_P = run.rounds.load_shared(round, "shared.values")
    return hashlib.sha256(values_P.numpy().tobytes()).hexdigest()
