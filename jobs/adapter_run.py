"""A run of very many clients with adapters of their own that nobody trained: for serving at scale.

Real pages of real size, committed the real way; only the numbers in them are drawn. Nothing here
trains or serves.
"""

from pathlib import Path

import torch

from fellray.jobs.crowd import make_crowd
from fellray.platform import config as configs
from fellray.platform.adapters import start
from fellray.platform.encoder import load_backbone
from fellray.platform.model_config import ModelConfig
from fellray.platform.outcome import Outcome
from fellray.platform.rounds import EVERYONE
from fellray.platform.run import open_run
from fellray.platform.shards import Dataset
from fellray.platform.slots import WRITTEN
from fellray.platform.split import plan_cut

SCALE = 0.01
"""Standard deviation of what is added to the start."""


def make_adapter_run(folder: Path, clients: int, model: ModelConfig, seed: int) -> str:
    """Data of so many clients, one user each, and a run with a page for each at round 1.

    Returns:
        The run's folder.
    """
    tree = {
        "name": "adapters",
        "storage": str(folder / "runs"),
        "seed": seed,
        "data": {"path": str(folder / "data"), "partition": {"kind": "per_user"}, "k_core": 1},
        "model": model.model_dump(mode="json"),
        "method": {"kind": "local"},
    }
    config = configs.parse(tree, "adapters")
    make_crowd(config, clients, seed)
    data = Dataset(config.data.path)
    cut = plan_cut(load_backbone(model.name), model)
    starts = {
        "client": start(cut.outer, model.lora, seed),
        "trunk": start(cut.sites["trunk"], model.lora, seed),
    }
    draw = torch.Generator().manual_seed(seed)
    with open_run(config, data.sha256) as run:
        staged = [
            run.rounds.stage(0, f"start-{part}", (EVERYONE,), {f"{part}.values": values_P[None]})
            for part, values_P in starts.items()
        ]
        run.commit(0, Outcome(staged, None), [], [])
        staged = []
        for at in range(0, clients, WRITTEN):
            few = data.clients[at : at + WRITTEN]
            for part, values_P in starts.items():
                rows = values_P + SCALE * torch.randn(len(few), len(values_P), generator=draw)
                name = f"{part}-{at // WRITTEN}"
                staged.append(run.rounds.stage(1, name, few, {f"{part}.values": rows}))
        run.commit(1, Outcome(staged, None), [], [])
    return f"{config.storage}/{config.name}"
