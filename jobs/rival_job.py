"""A federated training as plain files, so that another framework can do precisely the same.

    job.json                      the model's shape, AdamW's settings, who trains in which round
    frozen.safetensors            the encoder by Hugging Face's names, and `items` [I, d]
    start.safetensors             `theta_P`: every adapter A, then B, block by block
    clients/<id>.safetensors      `prior_I`, and of each round t in which it trains
                                  `t.ids_L`, `t.lengths_N`, `t.target_N`

The rows are a `Reader`'s, in its order. These files hold every client's tokens and labels: they are
for comparing frameworks on one machine, and no part of a run. Nothing here trains.

Shapes: N rows of a round, L real tokens of all rows together, I items, d width, P parameters.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from fellray.actors.world import World, survey
from fellray.platform import config as configs
from fellray.platform.adapters import Pair, Site, start, views
from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.metrics import Evaluator, Score
from fellray.platform.reader import Reader
from fellray.platform.retrieval import Scorer
from fellray.platform.sampling import Sampler
from fellray.platform.shards import Dataset
from fellray.platform.split import PARTS, cut_model, plan_cut
from fellray.platform.tower import Tower

CONFIG = "config.json"
"""Our own config beside the job, for our side's run of it."""
_ALONE = torch.zeros(1, dtype=torch.int64)
"""The one slot of a model that everybody shares."""


def draw_cohorts(config: RunConfig, clients: Sequence[str]) -> list[tuple[str, ...]]:
    """Who trains in rounds 1, 2, ... of the run, sorted by id."""
    sampler = Sampler(config.sampling, config.seed, clients)
    rounds = range(1, config.train.rounds + 1)
    return [tuple(clients[i] for i in sampler.sample(t)) for t in rounds]


def export_rival_job(config: RunConfig, folder: Path, cores: int) -> None:
    """Write the job of a run whose data is prepared. Files that are there are replaced.

    Args:
        cores: how many one-threaded workers train side by side.

    Raises:
        FellrayError: the run has what the plain learner has not: another family than BERT, another
            method, clipping, or moments that stay.
    """
    world = survey(config)
    _refuse(config, world)
    model, train, backbone = config.model, config.train, world.backbone
    clients = sorted(world.seats)
    cohorts = draw_cohorts(config, clients)
    sites = _sites(config, world)
    facts = {
        "clients": clients,
        "cohorts": cohorts,
        "local_samples": train.local_samples,
        "batch_size": train.batch_size,
        "learning_rate": train.learning_rate,
        "adamw": {
            "betas": [train.beta1, train.beta2],
            "eps": train.eps,
            "weight_decay": train.weight_decay,
        },
        "blocks": backbone.num_blocks,
        "heads": backbone.config["num_attention_heads"],
        "eps": backbone.config["layer_norm_eps"],
        "r": model.lora.r,
        "scaling": model.lora.scaling,
        "sites": [{"path": site.path, "shape": [site.d_in, site.d_out]} for site in sites],
        "temperature": model.temperature,
        "threads": 1,
        "cores": cores,
    }
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    weights = {n: a for n, a in backbone.arrays.items() if a.dtype.kind == "f"}
    frozen = weights | {"items": world.catalogue.vectors_Id}
    save_file(
        {n: np.ascontiguousarray(a) for n, a in frozen.items()}, folder / "frozen.safetensors"
    )
    theta = start(sites, model.lora, config.seed).numpy()
    save_file({"theta_P": theta}, folder / "start.safetensors")
    rounds_of: dict[str, list[int]] = {}
    for t, cohort in enumerate(cohorts, 1):
        for client in cohort:
            rounds_of.setdefault(client, []).append(t)
    data = Dataset(config.data.path)
    for client, rounds in rounds_of.items():
        arrays = _read_client(config, world, data, client, rounds)
        save_file(arrays, folder / "clients" / f"{client}.safetensors")
    (folder / CONFIG).write_text(configs.dump(config), "utf-8")
    (folder / "job.json").write_text(json.dumps(facts), "utf-8")


def to_rival_order(config: RunConfig, world: World, ours_P: Tensor) -> Tensor:
    """One client's adapters, bottom, top and trunk in turn, as a job's `theta_P`."""
    cut = plan_cut(world.backbone, config.model)
    ours = [*cut.outer, *cut.sites["trunk"]]
    sizes = [site.num_parameters(config.model.lora.r) for site in ours]
    held = {site.path: p for site, p in zip(ours, ours_P.split(sizes), strict=True)}
    return torch.cat([held[site.path] for site in _sites(config, world)])


def rank(config: RunConfig, world: World, theta_P: Tensor) -> dict[str, Score]:
    """Each client's test users under one set of adapters for all, in the order of a job."""
    parts = cut_model(world.backbone, config.model)
    lora = config.model.lora
    whole = dict(
        zip(
            [site.path for site in _sites(config, world)],
            views(theta_P[None], _sites(config, world), lora.r),
            strict=True,
        )
    )
    outer = parts.cut.outer
    flat = [leaf.flatten() for site in outer for leaf in whole[site.path]]
    bank = Bank(outer, lora, config.train, 1)
    bank.reset(_ALONE, {"values": torch.cat(flat)[None]})
    inner: list[Pair] = [whole[site.path] for site in parts.cut.sites["trunk"]]
    tower = Tower(parts.bottom, parts.top, world.catalogue.tokens.pad, bank)
    data = Dataset(config.data.path)
    learners = {c: [data.shard(s) for s in own] for c, own in sorted(world.seats.items())}
    reader = Reader(config, world.catalogue.tokens, learners)
    vectors = world.catalogue.vectors_Id
    scorer = Scorer(vectors, reader.shards, config.model.temperature, config.model.prior)
    evaluators = {shard.client: Evaluator(len(vectors)) for shard in reader.shards}
    with torch.no_grad():
        for batch, seen, truth in reader.held_out(2, None):
            rows = batch.rows

            def cross(h_Ld: Tensor, rows: Any = rows) -> Tensor:
                answers = []
                for group in rows.groups:
                    n = len(group.rows_n)
                    pairs = [(a.expand(n, -1, -1), b.expand(n, -1, -1)) for a, b in inner]
                    answers.append(parts.trunk(rows.pad(h_Ld, group), group.mask_nT, [pairs]))
                packed: Tensor = rows.pack(answers)
                return packed

            slots = torch.zeros_like(batch.slot_N)
            vectors_Nd, _ = tower.encode(rows, batch.ids_L, slots, cross, False)
            owner = reader.shards[int(batch.shard_N[0])].client
            evaluators[owner].add(scorer.score(vectors_Nd, batch.shard_N), seen, truth)
    return {client: evaluator.score() for client, evaluator in evaluators.items()}


def _sites(config: RunConfig, world: World) -> list[Site]:
    """All adapted projections, block by block."""
    cut = plan_cut(world.backbone, config.model)
    return [site for part in PARTS for site in cut.sites[part]]


def _read_client(
    config: RunConfig, world: World, data: Dataset, client: str, rounds: Sequence[int]
) -> dict[str, np.ndarray]:
    shard = data.shard(client)
    reader = Reader(config, world.catalogue.tokens, {client: [shard]})
    counts = shard.counts(len(world.catalogue.vectors_Id)).astype(np.float32)
    prior = np.log1p(counts) if config.model.prior else np.zeros_like(counts)
    arrays = {"prior_I": prior}
    for t in rounds:
        steps = list(reader.steps(t))
        arrays |= {
            f"{t}.ids_L": np.concatenate([batch.ids_L.numpy() for batch, _ in steps]),
            f"{t}.lengths_N": np.concatenate([b.rows.lengths_N.numpy() for b, _ in steps]),
            f"{t}.target_N": np.concatenate([target_N.numpy() for _, target_N in steps]),
        }
    return arrays


def _refuse(config: RunConfig, world: World) -> None:
    """The plain learner is one model with one optimizer: say so before it computes other numbers.

    Raises:
        FellrayError: names the setting.
    """
    encoder = world.backbone.config
    wrong = {
        "model.name": encoder["model_type"] != "bert" or encoder["hidden_act"] != "gelu",
        "train.optimizer": config.train.optimizer != "adamw",
        "train.clip": config.train.clip is not None,
        "train.moments": config.train.moments != "reset",
        "train.share": config.train.share != "all",
        "server.shared_adapter": config.server.shared_adapter,
        "method": config.method.model_dump() != {"kind": "fedavg", "weighting": "uniform"},
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise FellrayError(
                f"{name}: a job for other frameworks is a BERT with gelu under uniform FedAvg, all "
                "adapters shared, no clipping, moments reset each round; change that setting"
            )
