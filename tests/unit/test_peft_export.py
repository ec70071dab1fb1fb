"""peft loads what was exported, and with it computes the learner's own model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from fellray.platform import peft_export
from fellray.platform.adapters import LoraLinear, Pair, views
from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig
from fellray.platform.encoder import load_backbone, load_tokenizer, tokenize
from fellray.platform.errors import FellrayError
from fellray.platform.own import ALIKE, Own
from fellray.platform.reader import assemble
from fellray.platform.rows import Rows
from fellray.platform.run import Run
from fellray.platform.split import cut_model
from fellray.platform.tower import Tower

# peft 0.21 reads a name of the model that transformers 5.23 gave another
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LEARNERS = ("c0", "c1")
TITLES = ["word01 word02 word03", "word17 word04"]
EVERY = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def make_run(config: RunConfig, own: Own = ALIKE) -> Run:
    """A run of one round whose adapters are far from zero."""
    run = Run(config)
    run.journal.write_json("own.json", own.tree())
    draw = torch.Generator().manual_seed(3)
    sites = cut_model(load_backbone(config.model.name), config.model).cut.sites
    sizes = {
        part: sum(site.num_parameters(config.model.lora.r) for site in own)
        for part, own in sites.items()
    }
    ends = sizes["bottom"] + sizes["top"]
    client = {"client.values": torch.randn(len(LEARNERS), ends, generator=draw) * 0.2}
    trunk = {"trunk.values": torch.randn(len(LEARNERS), sizes["trunk"], generator=draw) * 0.2}
    staged = [
        run.rounds.stage(0, "clients", LEARNERS, client),
        run.rounds.stage(0, "trunk", LEARNERS, trunk),
    ]
    if config.server.shared_adapter:
        shared = {"shared.values": torch.randn(sizes["trunk"], generator=draw) * 0.2}
        staged.append(run.rounds.stage(0, "shared", (), shared))
    run.rounds.commit(0, staged, {})
    return run


def encode(run: Run, learner: str) -> torch.Tensor:
    """The unit vector of TITLES by fellray's own parts [d]."""
    config = run.config
    model = config.model
    parts = cut_model(load_backbone(model.name), model)
    sites = parts.cut.sites
    loaded = run.rounds.load(0, [learner], ["client.values", "trunk.values"])
    ends = sites["bottom"] + sites["top"]
    (rank,) = run.own().ranks_of([learner], model.lora.r)
    lora = model.lora.model_copy(update={"r": rank})
    bank = Bank(ends, lora, config.train, 1)
    for place, whole in zip(
        views(bank.values_SP, ends, rank),
        views(loaded["client.values"], ends, model.lora.r),
        strict=True,
    ):
        place[0].copy_(whole[0][:, :rank])
        place[1].copy_(whole[1][:, :, :rank])
    for part in (parts.bottom, parts.top):
        for module in part.modules():
            if isinstance(module, LoraLinear):
                module.scaling = lora.scaling
    extra = lora.scaling / model.lora.scaling
    sets: list[list[Pair]] = [
        [
            (a[:, :rank], b[:, :, :rank] * extra)
            for a, b in views(loaded["trunk.values"], sites["trunk"], model.lora.r)
        ]
    ]
    if config.server.shared_adapter:
        shared = run.rounds.load_shared(0, "shared.values")[None]
        sets.append(views(shared, sites["trunk"], model.lora.r))
    tokens = tokenize(load_tokenizer(model.name), TITLES, model.max_tokens)
    ids, lengths = assemble(tokens, np.arange(len(TITLES))[None], model.max_tokens)
    rows = Rows(lengths, model.pad_multiple)
    (group,) = rows.groups

    def cross(h_Ld: torch.Tensor) -> torch.Tensor:
        return rows.pack([parts.trunk(rows.pad(h_Ld, group), group.mask_nT, sets)])

    tower = Tower(parts.bottom, parts.top, tokens.pad, bank)
    with torch.no_grad():
        u, _ = tower.encode(rows, ids, torch.zeros(1, dtype=torch.int64), cross, train=False)
    return u[0]


def encode_with_peft(encoder: str, folder: str) -> torch.Tensor:
    """The same by peft and transformers alone."""
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(encoder), folder).eval()
    text = " ; ".join(TITLES) + " ;"
    inputs = AutoTokenizer.from_pretrained(encoder)(text, return_tensors="pt")
    with torch.no_grad():
        hidden = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state
    return F.normalize(hidden[0].mean(0), dim=0)


@pytest.mark.parametrize("family", ["tiny_encoder", "tiny_roberta"])
@pytest.mark.parametrize("shared", [False, True], ids=["personal", "shared"])
@pytest.mark.parametrize(
    "lora",
    [
        {"r": 3, "target_modules": EVERY},
        {"r": 2, "use_rslora": True, "lora_alpha": 5.0, "target_modules": ["output.dense"]},
    ],
    ids=["every", "rslora"],
)
def test_peft_computes_the_learners_model(
    tiny_config: Callable[..., RunConfig],
    request: pytest.FixtureRequest,
    family: str,
    shared: bool,
    lora: dict[str, Any],
) -> None:
    encoder = str(request.getfixturevalue(family))
    model = {"name": encoder, "cut": 2, "top": 1, "lora": lora}
    run = make_run(tiny_config(model=model, server={"shared_adapter": shared}))
    folders = peft_export.export(run, 0, LEARNERS)
    assert [Path(folder).name for folder in folders] == list(LEARNERS)
    vectors = {}
    for learner, folder in zip(LEARNERS, folders, strict=True):
        vectors[learner] = encode_with_peft(encoder, folder)
        torch.testing.assert_close(vectors[learner], encode(run, learner), rtol=0, atol=1e-5)
    assert (vectors["c0"] - vectors["c1"]).abs().max() > 0.01


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["personal", "shared"])
def test_a_folder_has_its_learners_rank(
    tiny_config: Callable[..., RunConfig], shared: bool, rslora: bool
) -> None:
    config = tiny_config(
        model={"cut": 2, "lora": {"r": 4, "use_rslora": rslora}},
        server={"shared_adapter": shared},
        clients={"own": "gone.csv"},
    )
    run = make_run(config, Own({"c1": 3}))
    for learner, rank in (("c0", 4), ("c1", 3)):
        folder = peft_export.export(run, 0, [learner])[0]
        described = json.loads((Path(folder) / "adapter_config.json").read_text())
        assert described["r"] == rank
        assert set(described["rank_pattern"].values()) == ({rank + 4} if shared else set())
        found = encode_with_peft(config.model.name, folder)
        torch.testing.assert_close(found, encode(run, learner), rtol=0, atol=1e-5)
        weights = safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")
        ends = {min(w.shape) for name, w in weights.items() if ".layer.0." in name}
        assert ends == {rank}


def test_peft_adapts_our_sites_and_no_others(tiny_config: Callable[..., RunConfig]) -> None:
    run = make_run(tiny_config(model={"lora": {"target_modules": ["output.dense"]}}))
    folder = peft_export.export(run, 0, LEARNERS)[0]
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(run.config.model.name), folder)
    adapted = [name for name, part in model.named_modules() if hasattr(part, "lora_A")]
    assert adapted == [f"base_model.model.encoder.layer.{i}.output.dense" for i in range(5)]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_files_are_those_that_peft_writes(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, rslora: bool
) -> None:
    lora = {"r": 3, "lora_alpha": 9, "use_rslora": rslora}
    run = make_run(tiny_config(model={"lora": lora}, server={"shared_adapter": True}))
    ours = Path(peft_export.export(run, 0, LEARNERS)[1])
    loaded = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(run.config.model.name), str(ours)
    )
    loaded.save_pretrained(tmp_path)
    config = json.loads((ours / "adapter_config.json").read_text())
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs["target_modules"].sort()
    assert config.items() <= theirs.items()
    unnamed = {key: theirs[key] for key in theirs.keys() - config.keys()}
    defaults = peft.LoraConfig().to_dict()
    assert unnamed == {key: defaults[key] for key in unnamed}
    weights = [f / "adapter_model.safetensors" for f in (ours, tmp_path)]
    mine, peers = map(safetensors.torch.load_file, weights)
    assert mine.keys() == peers.keys()
    assert all(torch.equal(mine[name], peers[name]) for name in mine)
    trunk = {name for name, t in mine.items() if 6 in t.shape}
    assert len(trunk) == 2 * len(config["rank_pattern"]) == 2 * 2 * 3  # two sites in three blocks


def test_export_again_gives_the_same_bytes(tiny_config: Callable[..., RunConfig]) -> None:
    run = make_run(tiny_config())
    folders = [Path(folder) for folder in peft_export.export(run, 0, LEARNERS)]
    names = ["adapter_config.json", "adapter_model.safetensors"]
    first = [(folder / name).read_bytes() for folder in folders for name in names]
    peft_export.export(run, 0, LEARNERS)
    assert first == [(folder / name).read_bytes() for folder in folders for name in names]
    assert all(sorted(path.name for path in folder.iterdir()) == names for folder in folders)


def test_a_round_that_never_happened_is_refused(tiny_config: Callable[..., RunConfig]) -> None:
    run = make_run(tiny_config())
    with pytest.raises(FellrayError, match="round 4 never happened; committed rounds: 0"):
        peft_export.export(run, 4, LEARNERS)
    assert not run.storage.exists("adapters")
