"""Orientation: item-kNN, BPR-MF and SASRec trained on everybody's data in one place.

    python -m fellray.jobs.orientation CONFIG [--tries 1] [--seeds 0,1,2] [--rows sasrec]
        [key=value ...]

No method here may see data so; the rows say what that would be worth. They are evaluated as methods
are: the same users, the same held-out items, full ranking, each client apart.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from fellray.jobs.display import console
from fellray.platform import config as configs
from fellray.platform.collaborative import fit_bpr_mf, fit_item_knn, require_library
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.journal import Journal
from fellray.platform.metrics import Score, balance
from fellray.platform.outcome import pool
from fellray.platform.sasrec import fit_sasrec
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.platform.union import Scorer, Union, gather, rank
from fellray.platform.words import HEADLINE, ORIENTATION, name_metric

VALIDATION: Literal[1] = 1
TEST: Literal[2] = 2
THREADS = 2
"""Of torch; they decide SASRec's bits."""
_BPR = {"factors": 64, "learning_rate": 0.05, "regularization": 0.01, "epochs": 200}
_SASREC = {
    "width": 64,
    "blocks": 2,
    "places": 100,
    "dropout": 0.2,
    "loss": "softmax",
    "learning_rate": 0.001,
    "batch_size": 64,
    "epochs": 30,
}
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "item_knn": tuple({"neighbours": k} for k in (100, 20, 50, 200)),
    "bpr_mf": (
        _BPR,
        _BPR | {"learning_rate": 0.02},
        _BPR | {"regularization": 0.05},
        _BPR | {"factors": 128},
    ),
    "sasrec": (
        _SASREC,
        _SASREC | {"loss": "bce", "epochs": 60},
        _SASREC | {"dropout": 0.5},
        _SASREC | {"width": 128},
    ),
}
"""What tuning tries, in this order, as many as methods may try."""
FITS: dict[str, Callable[[Union, Mapping[str, Any], int], Iterator[Scorer]]] = {
    "item_knn": fit_item_knn,
    "bpr_mf": fit_bpr_mf,
    "sasrec": fit_sasrec,
}


def orient(
    config: RunConfig, tries: int, seeds: Sequence[int], rows: Sequence[str] = tuple(ORIENTATION)
) -> dict[str, dict[str, Any]]:
    """Train what is not trained yet; each row is kept in `NAME-orientation/ROW.json`.

    Settings are chosen on validation with the first seed, and within a training the best of the
    stages it is looked at, as methods choose their round.

    Args:
        tries: how many settings each row tries; fewer where `SETTINGS` has fewer.

    Returns:
        row -> `settings` chosen, `tried` (settings and validation) and `seeds`: for each `seed`,
        `stage`, `validation`, `test`, `per_client`, `balance` and `hash` (of its test scores).

    Raises:
        FellrayError: the run is on attributes, data are not prepared, or `implicit` is missing.
    """
    check_orientation(config)
    data = Dataset(config.data.path)
    union = gather(data)
    storage = Storage(config.storage).sub(f"{config.name}-orientation")
    return {row: _find(row, tries, seeds, data, union, storage) for row in rows}


def check_orientation(config: RunConfig) -> None:
    """Refuse before anything is trained.

    Raises:
        FellrayError: as `orient`.
    """
    require_library()
    if config.attributes is not None:
        raise FellrayError(
            f"{config.name}: is on attributes, where items are not ranked: leave orientation out"
        )


def tabulate_orientation(
    found: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[dict[str, float]]]:
    """Row -> a seed's test metrics and `balance/min` and the like, as a comparison shows them."""
    return {
        row: [
            own["test"] | {f"balance/{name}": value for name, value in own["balance"].items()}
            for own in result["seeds"]
        ]
        for row, result in found.items()
    }


def _find(
    row: str, tries: int, seeds: Sequence[int], data: Dataset, union: Union, storage: Storage
) -> dict[str, Any]:
    settings = SETTINGS[row][:tries]
    asked = {
        "data_sha256": data.sha256,
        "settings": list(settings),
        "seeds": list(seeds),
        "threads": THREADS,
        "libraries": {name: version(name) for name in ("implicit", "torch")},
    }
    if (known := _read(storage, f"{row}.json")).get("asked") == asked:
        return known
    console.print(f"{row}: {ORIENTATION[row]}", soft_wrap=True)
    trained = [_train(row, own, seeds[0], data, union) for own in settings]
    best = max(range(len(settings)), key=lambda at: trained[at]["validation"][HEADLINE])
    rest = [_train(row, settings[best], seed, data, union) for seed in seeds[1:]]
    result = {
        "asked": asked,
        "settings": settings[best],
        "tried": [
            {"settings": own, "validation": found["validation"]}
            for own, found in zip(settings, trained, strict=True)
        ],
        "seeds": [trained[best], *rest],
    }
    Journal(storage).write_json(f"{row}.json", result)
    return result


def _train(
    row: str, settings: Mapping[str, Any], seed: int, data: Dataset, union: Union
) -> dict[str, Any]:
    """One training; the test of the stage with the best validation."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        best: tuple[int, dict[str, float], Scorer] | None = None
        for stage, scorer in enumerate(FITS[row](union, settings, seed), start=1):
            scores = {client: score for client, score, _ in rank(data, union, scorer, VALIDATION)}
            found = pool(scores)
            if best is None or found[HEADLINE] > best[1][HEADLINE]:
                best = stage, found, scorer
        assert best is not None, "a fit yields at least one scorer"
        return {"seed": seed, "stage": best[0], "validation": best[1]} | _test(data, union, best[2])
    finally:
        torch.set_num_threads(before)


def _test(data: Dataset, union: Union, scorer: Scorer) -> dict[str, Any]:
    scores: dict[str, Score] = {}
    told = hashlib.sha256()
    for client, score, batches in rank(data, union, scorer, TEST):
        scores[client] = score
        for scores_BI in batches:
            told.update(scores_BI.contiguous().numpy().tobytes())
    per_client = {c: {"users": s.users, **s.means()} for c, s in scores.items()}
    return {
        "test": pool(scores),
        "per_client": per_client,
        "balance": balance({c: own[HEADLINE] for c, own in per_client.items() if HEADLINE in own}),
        "hash": told.hexdigest(),
    }


def _read(storage: Storage, name: str) -> dict[str, Any]:
    """What was found before; empty where nothing was, or what there is cannot be read."""
    if not storage.exists(name):
        return {}
    try:
        tree = json.loads(storage.read(name))
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def main() -> None:
    """See above; prints the rows."""
    parser = argparse.ArgumentParser(prog="fellray.jobs.orientation")
    parser.add_argument("config", type=Path)
    parser.add_argument("--tries", type=int, default=1)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default=",".join(ORIENTATION))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    told = parser.parse_intermixed_args()
    rows = told.rows.split(",")
    if unknown := [row for row in rows if row not in ORIENTATION]:
        raise FellrayError(f"--rows: no row {unknown[0]!r}; there are {', '.join(ORIENTATION)}")
    if told.tries < 1:
        raise FellrayError(f"--tries {told.tries}: give at least 1")
    seeds = [int(seed) for seed in told.seeds.split(",")]
    config = configs.load(told.config, told.overrides)
    found = orient(config, told.tries, seeds, rows)
    for row, tested in tabulate_orientation(found).items():
        told_of = ", ".join(
            f"{name_metric(metric)} {fmean(own[metric] for own in tested):.4f}"
            for metric in (HEADLINE, "recall@10", "balance/min")
        )
        console.print(f"{row}: {told_of}; settings {found[row]['settings']}", soft_wrap=True)


if __name__ == "__main__":
    main()
