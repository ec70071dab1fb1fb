"""Evaluate: a committed round of a run against the held-out items, per client and pooled."""

import json
import sys
from typing import Any

from fellray.actors.plant import Plant
from fellray.actors.session import connect
from fellray.actors.world import survey
from fellray.platform.errors import FellrayError
from fellray.platform.metrics import balance
from fellray.platform.outcome import BALANCED, pool
from fellray.platform.run import read_run
from fellray.platform.seating import deal

SPLITS = {"valid": 1, "test": 2}


def evaluate(path: str, round: int | None = None, split: str = "test") -> dict[str, Any]:
    """`pooled`, `per_client` and `balance` of a run at a round (the best one by default).

    Raises:
        FellrayError: no such run, round or split.
    """
    if split not in SPLITS:
        raise FellrayError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    run = read_run(path)
    chosen = run.best_round() if round is None else round
    if chosen not in (kept := run.rounds.committed()):
        raise FellrayError(
            f"{run.storage}: holds no round {chosen}; it has "
            f"{', '.join(map(str, kept)) or 'none: train it first'} (keep_last says how many stay)"
        )
    run.rounds.facts(chosen)  # refuses a damaged one
    config, world = run.config, survey(run.config, run.own())
    with (
        connect(config, len(deal(list(world.seats), config.clients.together))),
        Plant.on_ray(config, world, run.rounds) as plant,
    ):
        scores = plant.evaluate(chosen, SPLITS[split])
    per_client = {client: score.means() for client, score in sorted(scores.items())}
    return {
        "run": config.name,
        "round": chosen,
        "split": split,
        "pooled": pool(scores),
        "per_client": per_client,
        "balance": balance({c: m[BALANCED] for c, m in per_client.items() if BALANCED in m}),
    }


def main() -> None:
    """`python jobs/evaluate.py RUN [ROUND]`, also under `ray job submit`."""
    path, *rest = sys.argv[1:]
    print(json.dumps(evaluate(path, int(rest[0]) if rest else None), indent=2))


if __name__ == "__main__":
    main()
