"""Who computes on a GPU: whoever was given a share of one, where there is one, and nobody else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fellray.actors import client, server
from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.platform.config import RunConfig
from fellray.platform.device import choose_device
from fellray.platform.rounds import Rounds
from fellray.platform.storage import Storage


def open_plant(config: RunConfig) -> Plant:
    rounds = Rounds(Storage(config.storage).sub(config.name))
    return Plant.inline(config, survey(config), rounds)


@pytest.mark.parametrize(
    ("asked", "there", "chosen"),
    [
        pytest.param(False, False, "cpu", id="nothing asked, nothing there"),
        pytest.param(False, True, "cpu", id="a GPU that nobody gave it"),
        pytest.param(True, False, "cpu", id="a GPU that is only pretended"),
        pytest.param(True, True, "cuda", id="its share"),
    ],
)
def test_a_gpu_must_be_asked_for_and_be_there(
    asked: bool, there: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device(asked) == torch.device(chosen)


def test_beside_a_gpu_the_default_config_computes_on_the_cpu(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plant = open_plant(tiny_config(clients={"per_actor": 5}))
    (member,) = plant._clients.members  # type: ignore[attr-defined]  # an InlinePool
    (host,) = plant._servers.pool.members  # type: ignore[attr-defined]
    assert member._device == torch.device("cpu")
    assert host._merger._engine.module.shared_P.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"clients": {"per_actor": 5, "gpu_denominator": 4}}, {"client": True, "server": False}),
        ({"clients": {"per_actor": 5}, "server": {"gpus": 0.5}}, {"client": False, "server": True}),
    ],
)
def test_each_side_follows_its_own_share(
    settings: dict[str, Any],
    asked: dict[str, bool],
    tiny_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: dict[str, bool] = {}

    def listen(name: str) -> Callable[[bool], torch.device]:
        def answer(share: bool) -> torch.device:
            heard[name] = share
            return torch.device("cpu")

        return answer

    for name, module in (("client", client), ("server", server)):
        monkeypatch.setattr(module, "choose_device", listen(name))
    open_plant(tiny_config(**settings))
    assert heard == asked
