"""Runs on attributes: their pre-training, and what comes before and after the rounds.

The rounds themselves are those of jobs/train.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import save_file

from fellray.actors.attribute_plant import AttributePlant
from fellray.actors.attribute_world import AttributeWorld
from fellray.actors.session import connect
from fellray.jobs.attribute_summary import summarise_attributes
from fellray.jobs.display import Display, console
from fellray.jobs.finish import tell_stop
from fellray.platform.attribute_model import Backbone, Shape, describe_backbone
from fellray.platform.attribute_page import render_attributes
from fellray.platform.attributes import AttributeConfig
from fellray.platform.click_data import name_tensors, write_clicks
from fellray.platform.clicks import TEST, Clicks, read_clicks, split_clicks
from fellray.platform.config import RunConfig
from fellray.platform.fedpa import Fedpa
from fellray.platform.pretraining import Fitted, Samples, distil, evaluate_backbone, pretrain
from fellray.platform.privacy_config import GaussianNoise
from fellray.platform.run import Run, open_run
from fellray.platform.seating import deal

EXPORT = "student"
"""Name of the exported student: a safetensors file, and a JSON file that describes it."""


def prepare_attributes(config: RunConfig) -> dict[str, Any]:
    """Read clicks, pre-train on open users, distil where a student is asked for, write `data.path`.

    Returns:
        The manifest.
    """
    attributes = config.attributes
    assert attributes is not None
    clicks = read_clicks(attributes, config.data)
    opened, tested = _open_samples(clicks), _client_samples(clicks, attributes)
    user_rows = tuple(feature.rows for feature in clicks.user_features)
    item_rows = tuple(feature.rows for feature in clicks.item_features)
    shape = Shape(user_rows, item_rows, attributes.dim, attributes.layers)
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


def train_attributes(
    config: RunConfig, play: Callable[[Run, AttributePlant, Display], None]
) -> dict[str, Any]:
    """Train the row that the result is read beside, user embeddings alone, nothing sent; then the
    run; its report.

    Args:
        play: turns the rounds.

    Returns:
        The summary.
    """
    world = AttributeWorld(config)
    with connect(config, len(deal(world.clients, config.clients.together))):
        rows = {}
        if (alone := _alone(config)) is not None:
            # before the run, whose summary is then whole when it is there
            rows["embedding_only"] = _train(alone, AttributeWorld(alone), play, {})["test"]
        return _train(config, world, play, rows)


def _train(
    config: RunConfig,
    world: AttributeWorld,
    play: Callable[[Run, AttributePlant, Display], None],
    rows: dict[str, Any],
) -> dict[str, Any]:
    with (
        open_run(config, world.data_sha256) as run,
        AttributePlant.on_ray(config, world, run.rounds) as plant,
        Display(config, str(run.storage), run.to_go(), run.events) as display,
    ):
        play(run, plant, display)
        tell_stop(run, display)
        display.say("testing")
        summary = plant.replayed(summarise_attributes, run, world) | rows
        run.journal.write_json("summary.json", summary)
        page = render_attributes(
            summary, run.journal.rows("metrics"), run.config.model_dump(mode="json")
        )
        run.journal.write_text("report.html", page)
    return summary


def _alone(config: RunConfig) -> RunConfig | None:
    """The same run with user embeddings alone; None where that is not asked for, or is this one."""
    assert config.attributes is not None
    assert isinstance(config.method, Fedpa)
    if not config.attributes.baseline:
        return None
    rates = config.method.rates.model_copy(
        update=dict.fromkeys(("user", "group", "gate", "output"), 0.0)
    )
    method = config.method.model_copy(update={"rates": rates, "as_published": False, "groups": ()})
    attributes = config.attributes.model_copy(update={"baseline": False})
    name = f"{config.name}-embedding-only"
    privacy = config.privacy
    if isinstance(privacy, GaussianNoise):
        # it has no update to noise; its loss, of the same data, would be in no epsilon: not sent
        free = dict.fromkeys(("loss_clip", "loss_sigma", "epsilon"))
        privacy = privacy.model_copy(update=free)
    changed = {"name": name, "method": method, "attributes": attributes, "privacy": privacy}
    return config.model_copy(update=changed)


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
