"""Orientation: what it trains on, its evaluation, which is that of methods, and its choices."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs import orientation
from fellray.jobs.orientation import orient, tabulate_orientation
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.outcome import pool
from fellray.platform.rounds import Rounds
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.platform.union import Scorer, Union, gather, rank

Make = Callable[..., RunConfig]


def test_everybodys_training_rows_and_no_other(tiny_data: Path) -> None:
    data = Dataset(tiny_data)
    union = gather(data)
    found = {
        int(user): union.items[start:stop].tolist()
        for user, start, stop in zip(union.users, union.offsets, union.offsets[1:], strict=False)
    }
    expected: dict[int, list[int]] = {}
    for client in data.clients:
        for row in data.rows(client).to_pylist():
            own = expected.setdefault(row["user_id"], [])
            if row["split"] == 0:
                own.append(row["item"])
    assert found == expected
    assert list(found) == sorted(found)
    assert union.places(np.array([union.users[7], union.users[0]])).tolist() == [7, 0]


@pytest.mark.parametrize("split", [1, 2])
def test_evaluated_as_methods_are(tiny_config: Make, split: Any) -> None:
    """Popularity through this evaluation is the plant's own row, client by client, bit for bit."""
    config = tiny_config()
    data = Dataset(config.data.path)
    popularity_I = torch.tensor(data.popularity).float()

    def scorer(places: np.ndarray, histories: Any) -> Tensor:
        assert len(places) == len(histories)
        return popularity_I.expand(len(places), -1)

    found = {client: score for client, score, _ in rank(data, gather(data), scorer, split)}
    rounds = Rounds(Storage(config.storage).sub(config.name))
    with Plant.inline(config, survey(config), rounds) as plant:
        assert plant.evaluate_baselines(split)["popularity"] == found


def draws(union: Union, settings: Mapping[str, Any], seed: int) -> Iterator[Scorer]:
    """Three scorers that know nothing."""
    for stage in range(3):
        draw = torch.Generator().manual_seed(100 * settings["k"] + 10 * seed + stage)
        scores_UI = torch.rand(len(union.users), union.num_items, generator=draw)
        yield lambda places, histories, scores=scores_UI: scores[torch.from_numpy(places)]


def test_validation_chooses_settings_and_stage(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    data = Dataset(config.data.path)
    union = gather(data)
    settings = tuple({"k": k} for k in range(5))
    monkeypatch.setitem(orientation.SETTINGS, "sasrec", settings)
    monkeypatch.setitem(orientation.FITS, "sasrec", draws)

    def measure(k: int, seed: int, split: Any) -> list[float]:
        scorers = draws(union, {"k": k}, seed)
        ranked = [{c: s for c, s, _ in rank(data, union, own, split)} for own in scorers]
        return [pool(scores)["ndcg@10"] for scores in ranked]

    valid = [max(measure(k, 4, 1)) for k in range(3)]
    best = int(np.argmax(valid))
    found = orient(config, tries=3, seeds=[4, 5], rows=["sasrec"])["sasrec"]
    assert found["settings"] == {"k": best}
    assert [own["validation"]["ndcg@10"] for own in found["tried"]] == valid
    for own, seed in zip(found["seeds"], (4, 5), strict=True):
        stage = int(np.argmax(measure(best, seed, 1)))
        assert (own["seed"], own["stage"]) == (seed, stage + 1)
        assert own["test"]["ndcg@10"] == measure(best, seed, 2)[stage]
    first = found["seeds"][0]
    lowest = min(own["ndcg@10"] for own in first["per_client"].values())
    assert first["balance"]["min"] == lowest
    assert tabulate_orientation({"sasrec": found})["sasrec"][0]["balance/min"] == lowest


def test_what_was_found_is_kept(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    trained = []

    def fit(union: Union, settings: Mapping[str, Any], seed: int) -> Iterator[Scorer]:
        trained.append(seed)
        return draws(union, settings | {"k": 1}, seed)

    monkeypatch.setitem(orientation.FITS, "item_knn", fit)
    first = orient(config, 1, [0, 1], ["item_knn"])
    assert trained == [0, 1]
    assert orient(config, 1, [0, 1], ["item_knn"]) == first
    assert trained == [0, 1]
    orient(config, 1, [0, 2], ["item_knn"])
    assert trained == [0, 1, 0, 2]
    kept = Path(config.storage) / "tiny-orientation" / "item_knn.json"
    kept.write_text(kept.read_text()[:-9])  # damaged: found again
    orient(config, 1, [0, 2], ["item_knn"])
    assert len(trained) == 6
    assert json.loads(kept.read_text())["asked"]["seeds"] == [0, 2]


def test_all_rows_on_small_data(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"width": 8, "epochs": 15, "places": 8}
    (first, *_) = orientation.SETTINGS["sasrec"]
    monkeypatch.setitem(orientation.SETTINGS, "sasrec", (first | small,))
    found = orient(tiny_config(), 2, [0])
    again = orient(tiny_config(), 2, [0])  # another storage: trained again
    assert list(found) == ["item_knn", "bpr_mf", "sasrec"]
    for row, own in found.items():
        assert own["seeds"][0]["hash"] == again[row]["seeds"][0]["hash"], row
        assert len(own["seeds"][0]["per_client"]) == 5
    assert [len(own["tried"]) for own in found.values()] == [2, 2, 1]


def test_attributes_are_refused(tiny_config: Make) -> None:
    config = tiny_config().model_copy(update={"attributes": object()})
    with pytest.raises(FellrayError, match="leave orientation out"):
        orient(config, 1, [0])
