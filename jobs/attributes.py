"""Runs on attributes: their pre-training, and what comes before and after the rounds.

The rounds themselves are those of jobs/train.py.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import save_file

from fellray.actors.attribute_client import PRIVATE
from fellray.actors.attribute_plant import AttributePlant, AttributeWorld
from fellray.actors.client import deal
from fellray.actors.session import connect
from fellray.jobs.display import Display, console
from fellray.platform.attribute_model import Backbone, Shape, describe_backbone
from fellray.platform.attributes import AttributeConfig
from fellray.platform.click_data import (
    TEST,
    Clicks,
    name_tensors,
    read_clicks,
    split_clicks,
    write_clicks,
)
from fellray.platform.click_score import pool_clicks
from fellray.platform.config import RunConfig
from fellray.platform.fedpa import Fedpa
from fellray.platform.ledger import total
from fellray.platform.messages import LedgerRow
from fellray.platform.pretraining import Fitted, Samples, distil, evaluate_backbone, pretrain
from fellray.platform.run import Run, environment, open_run

EXPORT = "student"
"""Name of the exported student: a safetensors file, and a JSON file that describes it."""
METRICS = ("auc", "gauc", "log_loss", "precision", "calibration", "ece")


def prepare_attributes(config: RunConfig) -> dict[str, Any]:
    """Read clicks, pre-train on open users, distil where a student is asked for, write `data.path`.

    Returns:
        The manifest.
    """
    attributes = config.attributes
    assert attributes is not None
    clicks = read_clicks(attributes, config.data)
    opened, tested = _open_samples(clicks), _client_samples(clicks, attributes)
    rows = (tuple(f.rows for f in fs) for fs in (clicks.user_features, clicks.item_features))
    shape = Shape(*rows, attributes.dim, attributes.layers)
    fitted = pretrain(attributes, shape, opened, config.data.seed, _tell("pre-training"))
    facts: dict[str, Any] = {
        "attributes": attributes.model_dump(mode="json"),
        "teacher": _describe(fitted, tested),
    }
    backbone, path = fitted.backbone, config.data.path
    if attributes.student is not None:
        taught = distil(
            attributes,
            attributes.student,
            fitted.backbone,
            opened,
            config.data.seed,
            _tell("distilling"),
        )
        backbone = taught.backbone
        facts["student"] = _describe(taught, tested)
        _export(path, clicks, backbone, facts)
    return write_clicks(path, clicks, attributes, backbone, facts)


def show_prepared(config: RunConfig, manifest: dict[str, Any]) -> None:
    """Who is open, who is a client, and what the backbone can do so far."""
    counts = manifest["counts"]
    console.print(
        f"{config.data.path}: {counts['open_users']} open users, {counts['clients']} clients with "
        f"{counts['train']}/{counts['valid']}/{counts['test']} train/valid/test samples, "
        f"{counts['items']} items"
    )
    table = Table("backbone", "parameters", "FLOPs a sample", "epoch", "AUC held out", "AUC test")
    for name in ("teacher", "student"):
        if row := manifest.get(name):
            table.add_row(
                name,
                f"{row['parameters']:,}",
                f"{row['flops_per_sample']:,}",
                str(row["epoch"]),
                f"{row['held_out']['auc']:.4f}",
                f"{row['test']['auc']:.4f}",
            )
    console.print(table)


@contextmanager
def open_attributes(config: RunConfig) -> Iterator[tuple[Run, AttributePlant, Display]]:
    """A run on attributes with its actors, as `jobs/train.py` opens one on a language model."""
    world = AttributeWorld(config)
    with (
        open_run(config, world.data_sha256) as run,
        connect(config, len(deal(world.clients, config.clients.together))),
        AttributePlant.on_ray(config, world, run.rounds) as plant,
        Display(config, str(run.storage), run.to_go(), run.events) as display,
    ):
        yield run, plant, display


def finish_attributes(
    run: Run,
    plant: AttributePlant,
    display: Display,
    train: Callable[[RunConfig], dict[str, Any]],
) -> dict[str, Any]:
    """Test the best round and write `summary.json`; the summary.

    Args:
        train: trains the row that a result is read beside: user embeddings alone, nothing sent.
    """
    config, best = run.config, run.best_round()
    display.say(f"testing round {best}")
    world = AttributeWorld(config)
    test, validation = (plant.replayed(_score, best, split) for split in ("test", "valid"))
    untrained = plant.replayed(_score, 0, "test")
    ledger = [
        LedgerRow(**{k: v for k, v in row.items() if k != "round"})
        for row in run.journal.rows("ledger")
    ]
    last = run.rounds.latest() or 0
    alone = _alone(config)
    summary = {
        "run": config.name,
        "method": config.method.kind,
        "seed": config.seed,
        "rounds": last,
        "best_round": best,
        "clients": len(plant.learners),
        "test": test,
        "validation": validation,
        "untrained": untrained,
        **({"embedding_only": train(alone)["test"]} if alone else {}),
        "counts": world.layout.count(),
        "adapter_norms": measure_adapters(run, plant, best),
        "groups": {a: len(set(names)) for a, names in world.groups.items()},
        "bytes": total(ledger),
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
    run.journal.write_json("summary.json", summary)
    return summary


def show_attributes(summary: dict[str, Any]) -> None:
    """The test table of a run: the method beside the rows that it must be read beside."""
    table = Table("test", *METRICS, title=f"{summary['run']} (best round {summary['best_round']})")
    for row in ("untrained", "embedding_only", "test"):
        if values := summary.get(row):
            name = summary["method"] if row == "test" else row.replace("_", " ")
            table.add_row(name, *(f"{values[m]:.4f}" if m in values else "" for m in METRICS))
    console.print(table)
    norms = summary["adapter_norms"]
    console.print(f"largest adapter norms: user {norms['user']:.3g}, group {norms['group']:.3g}")
    for name, values in (("embedding only", "embedding_only"),):
        if values in summary and summary["test"]["auc"] < summary[values]["auc"]:
            console.print(f"{name}, with nothing sent, is higher than the method on this data")


def measure_adapters(run: Run, plant: AttributePlant, round: int) -> dict[str, float]:
    """The largest norm of any product A B of a user's adapters, and of any group's."""
    return plant.adapter_norms(round)


def _score(plant: AttributePlant, round: int, split: str) -> dict[str, float]:
    scores = plant.test(round) if split == "test" else plant.evaluate(round, 1)
    return pool_clicks(list(scores.values())).means()


def _alone(config: RunConfig) -> RunConfig | None:
    """The same run with user embeddings alone; None where that is not asked for, or is this one."""
    assert config.attributes is not None
    assert isinstance(config.method, Fedpa)
    if not config.attributes.baseline:
        return None
    rates = config.method.rates.model_copy(
        update=dict.fromkeys(("user", "group", "gate", "output"), 0.0)
    )
    method = config.method.model_copy(
        update={"rates": rates, "as_published": False, "groups": (), "decay": 1.0}
    )
    attributes = config.attributes.model_copy(update={"baseline": False})
    name = f"{config.name}-embedding-only"
    return config.model_copy(update={"name": name, "method": method, "attributes": attributes})


def _open_samples(clicks: Clicks) -> Samples:
    return _select(clicks, clicks.open_U[clicks.users_of_samples()])


def _client_samples(clicks: Clicks, config: AttributeConfig) -> Samples:
    """The clients' test samples: told of, never trained on, nothing is chosen by them."""
    own = ~clicks.open_U[clicks.users_of_samples()]
    split = split_clicks(clicks.ends_U, config.valid, config.test)
    return _select(clicks, own & (split == TEST))


def _select(clicks: Clicks, rows_N: np.ndarray) -> Samples:
    user = clicks.users_of_samples()[rows_N]
    return Samples(
        torch.from_numpy(clicks.users_UF[user]),
        torch.from_numpy(clicks.items_IF[clicks.item_N[rows_N]]),
        torch.from_numpy(clicks.label_N[rows_N].astype(np.float32)),
        torch.from_numpy(user),
    )


def _describe(fitted: Fitted, tested: Samples) -> dict[str, Any]:
    return {
        **describe_backbone(fitted.backbone.shape),
        "epoch": fitted.epoch,
        "held_out": fitted.held_out,
        "test": evaluate_backbone(fitted.backbone, tested),
    }


def _export(path: Path, clicks: Clicks, backbone: Backbone, facts: dict[str, Any]) -> None:
    """The student for a device: safetensors, and JSON that says how to read it."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(name_tensors(backbone, clicks), path / f"{EXPORT}.safetensors")
    tree = {
        **facts["student"],
        "teacher": facts["teacher"],
        "user_features": [f.tree() for f in clicks.user_features],
        "item_features": [f.tree() for f in clicks.item_features],
        "forward": "concat(user.*, item.*) rows; per layer relu(x W^T + b); sigmoid(x w^T + b)",
    }
    (path / f"{EXPORT}.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _tell(doing: str) -> Callable[[int, dict[str, float]], None]:
    def tell(epoch: int, held_out: dict[str, float]) -> None:
        console.print(f"  {doing}: epoch {epoch:>3}  AUC held out {held_out.get('auc', 0.0):.4f}")

    return tell
