"""Trained adapters in peft's own format: one folder per learner, loaded without fellray.

A folder holds the learner's whole model: bottom, trunk and top, put together again. This file must
not know how rounds are made, nor import peft: the format is a JSON file and a safetensors file.

Shapes: S learners, P parameters of one learner, r the largest rank.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fellray.platform.adapters import Pair, Site, views
from fellray.platform.encoder import MINILM, MINILM_HUB, Backbone, load_backbone
from fellray.platform.model_config import ModelConfig
from fellray.platform.residual import add, load_residual
from fellray.platform.run import Run
from fellray.platform.split import plan_cut


def export(run: Run, round: int, learners: Sequence[str]) -> list[str]:
    """Write `adapters/<learner>/` into the run's folder for every learner of a committed round.

    `PeftModel.from_pretrained(AutoModel.from_pretrained(encoder), folder)` then is the learner's
    model up to the pooling: a user's vector is the normalised mean of its hidden states over real
    tokens. A decoder is loaded by `AutoModelForCausalLM` and writes what the learner's does. peft
    knows one adapter per projection; where all learners share a trunk adapter, the
    personal and the shared one stand there as one of both ranks together, whose product is their
    sum. A learner's folder has the learner's own rank, and each block from whoever holds it. Where
    the method has changed the frozen weights, the encoder is the one in the run's folder `base/`,
    written here too: its config and weights, without a tokenizer. Where adapters have levels
    nothing is written: peft has no gate.

    Returns:
        The folders, sorted by learner.

    Raises:
        FellrayError: the round is not committed or damaged, the encoder cannot be loaded, or the
            storage refuses.
    """
    model = run.config.model
    if model.levels:
        return []
    r = model.lora.r
    backbone = load_backbone(model.name)
    planned = plan_cut(backbone, model)
    ends, trunk = planned.outer, planned.sites["trunk"]
    loaded = run.rounds.load(round, learners, ["client.values", "trunk.values"])
    stacked = _by_path(ends, views(loaded["client.values"], ends, r))
    served = _by_path(trunk, views(loaded["trunk.values"], trunk, r))
    moved = run.config.method.moves_base()
    encoder = str(run.storage.sub("base")) if moved else model.name
    if moved:
        _write_base(run, round, backbone, [*planned.outer, *trunk])
    stacked |= {path: pair for path, pair in served.items() if path not in stacked}
    shared: dict[str, Pair] = {}
    if run.config.server.shared_adapter:
        shared_1P = run.rounds.load_shared(round, "shared.values")[None]
        shared = _by_path(trunk, views(shared_1P, trunk, r))
    folders = [f"adapters/{learner}" for learner in learners]
    own = run.own()
    ranks = own.ranks_of(learners, r)
    cuts = own.cuts_of(learners) if own.cuts else [model.cut] * len(learners)
    for slot, (folder, rank, cut) in enumerate(zip(folders, ranks, cuts, strict=True)):
        here = {site.path for site in trunk if site.has(cut)}
        held = {p: served[p] if p in here else pair for p, pair in stacked.items()}
        pairs = {p: (a[slot, :rank], b[slot, :, :rank]) for p, (a, b) in held.items()}
        # peft multiplies both by one scale
        extra = model.lora.scaling_of(rank) / model.lora.scaling
        doubled = {path: pair for path, pair in shared.items() if path in here}
        for path, (c, d) in doubled.items():
            a, b = pairs[path]
            pairs[path] = torch.cat([a, c[0]]), torch.cat([b * extra, d[0]], 1)
        task = "CAUSAL_LM" if backbone.generative else "FEATURE_EXTRACTION"
        described = _describe(model, encoder, rank, list(pairs), list(doubled), task)
        config = json.dumps(described, indent=2, sort_keys=True) + "\n"
        run.storage.write(f"{folder}/adapter_model.safetensors", _pack(pairs))
        # equal for all rounds of a run: whatever ends the process between the two writes, weights
        # of one round never lie beside another's description
        run.storage.write(f"{folder}/adapter_config.json", config.encode())
    return [str(run.storage.sub(folder)) for folder in folders]


def _by_path(sites: Sequence[Site], pairs: Sequence[Pair]) -> dict[str, Pair]:
    return {site.path: pair for site, pair in zip(sites, pairs, strict=True)}


def _write_base(run: Run, round: int, backbone: Backbone, sites: Sequence[Site]) -> None:
    """The frozen weights as they are at a round, in transformers' format."""
    paths = {site.path: None for site in sites}
    arrays = {name: torch.from_numpy(array.copy()) for name, array in backbone.arrays.items()}
    for path, residual in load_residual(run.rounds, round, paths).items():
        name = f"{path}.weight"
        arrays[name] = add(arrays[name], residual, run.config.model.lora.scaling)
    data: bytes = safetensors.torch.save(arrays, metadata={"format": "pt"})
    run.storage.write("base/model.safetensors", data)
    config = json.dumps(backbone.config, indent=2, sort_keys=True) + "\n"
    run.storage.write("base/config.json", config.encode())


def _describe(
    model: ModelConfig,
    encoder: str,
    rank: int,
    paths: Sequence[str],
    doubled: Sequence[str],
    task: str,
) -> dict[str, Any]:
    """peft's `adapter_config.json`; what is left out has peft's default.

    Projections are named in full: peft takes a name for a suffix, and "output.dense" is one of
    "attention.output.dense" too.
    """
    lora = model.lora
    # peft divides by the sum of both ranks or by its root; the scale must stay that of rank r
    both = rank + lora.r
    times = both / lora.r
    alpha = lora.lora_alpha * (math.sqrt(times) if lora.use_rslora else times)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": MINILM_HUB if encoder == MINILM else encoder,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": lora.use_rslora,
        "target_modules": sorted(paths),
        "rank_pattern": dict.fromkeys(doubled, both),
        "alpha_pattern": dict.fromkeys(doubled, alpha),
    }


def _pack(pairs: Mapping[str, Pair]) -> bytes:
    """`adapter_model.safetensors` of one learner, under the names that peft gives."""
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        for letter, part in zip("AB", pair, strict=True):
            name = f"base_model.model.{path}.lora_{letter}.weight"
            tensors[name] = part.clone(memory_format=torch.contiguous_format)
    data: bytes = safetensors.torch.save(tensors, metadata={"format": "pt"})
    return data
