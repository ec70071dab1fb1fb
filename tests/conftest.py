"""Small models and small data for all tests, made on the spot from fixed seeds."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Read when torch is imported: on a busy machine, threads that spin while they wait take minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.prepare import prepare
from fellray.jobs.train import one_round
from fellray.platform import config as configs
from fellray.platform.config import RunConfig
from fellray.platform.messages import LedgerRow
from fellray.platform.outcome import Outcome
from fellray.platform.rounds import Rounds
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage

settings.register_profile("fellray", deadline=None)  # a busy machine is no bug
settings.load_profile("fellray")

WORDS = [f"word{i:02d}" for i in range(60)]
SPECIAL = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"},
    "roberta": {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>"},
}
"""Special tokens by role, in the order of their ids."""
SIZES = {
    "num_hidden_layers": 5,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
}
TINY = {
    "model": {"cut": 1, "top": 1, "lora": {"r": 2}, "max_history": 6, "max_tokens": 64},
    "train": {"rounds": 2, "local_samples": 12, "batch_size": 4, "learning_rate": 0.01},
    "clients": {"per_actor": 5},
    "server": {"engine": "torch", "threads": 1},
    "evaluation": {"max_users": 5},
}
"""What `tiny_config` differs in from the defaults."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Thread counts decide bits: a test that wants more says so."""
    torch.set_num_threads(1)


def _fill(module: torch.nn.Module, seed: int) -> None:
    """Weights large enough for every block to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
        for name, parameter in module.named_parameters():
            if name.endswith(("LayerNorm.weight", "norm.weight")):
                parameter.add_(1.0)


def _save_tokenizer(folder: Path, family: str) -> None:
    special = SPECIAL[family]
    vocabulary = {word: i for i, word in enumerate([*special.values(), ";", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["unk"]))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [special["cls"], special["sep"]]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=[(s, vocabulary[s]) for s in ends]
    )
    names = {f"{role}_token": token for role, token in special.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def _save_encoder(folder: Path, family: str) -> Path:
    vocabulary = len(SPECIAL[family]) + 1 + len(WORDS)
    model = (
        BertModel(BertConfig(vocab_size=vocabulary, **SIZES), add_pooling_layer=False)
        if family == "bert"
        else RobertaModel(
            RobertaConfig(vocab_size=vocabulary, type_vocab_size=1, pad_token_id=1, **SIZES),
            add_pooling_layer=False,
        )
    )
    _fill(model, seed=11)
    model.save_pretrained(folder)
    _save_tokenizer(folder, family)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 5 blocks and width 32 with a tokenizer of 60 words."""
    return _save_encoder(tmp_path_factory.mktemp("encoder") / "tiny-bert", "bert")


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a RoBERTa, whose positions count real tokens."""
    return _save_encoder(tmp_path_factory.mktemp("encoder") / "tiny-roberta", "roberta")


def _save_decoder(folder: Path, family: str) -> Path:
    """Four blocks of width 32, two query heads to one of keys, positions and all."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<|endoftext|>"]  # the latter is what transformers' Qwen2 pads with
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f'"{word} {word}" Response:\n' for word in WORDS], trainer)
    names = {"eos_token": special[1]}
    if family == "llama":  # as its own tokenizer does; Qwen's begins with the text
        names["bos_token"] = special[0]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = AutoConfig.for_model(
        family,
        vocab_size=tokenizer.get_vocab_size(),
        **{**SIZES, "num_hidden_layers": 4, "max_position_embeddings": 512},
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        tie_word_embeddings=family == "qwen2",
    )
    model = AutoModelForCausalLM.from_config(config)
    _fill(model, seed=13)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_decoder("qwen3")`: a random decoder of 4 blocks and width 32 with a tokenizer."""
    folder, made = tmp_path_factory.mktemp("decoder"), {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = _save_decoder(folder / f"tiny-{family}", family)
        return made[family]

    return make


def _write_source(folder: Path, num_users: int = 40, num_items: int = 50) -> Path:
    """Users of four tastes; titles of 1 to 9 words, so that histories differ in length."""
    draw = np.random.default_rng(5)
    lines = ["user_id,item_id,title,timestamp"]
    titles = [" ".join(draw.choice(WORDS, size=draw.integers(1, 10))) for _ in range(num_items)]
    for user in range(num_users):
        liked = np.arange(num_items) % 4 == user % 4
        chance = np.where(liked, 6.0, 1.0)
        items = draw.choice(num_items, draw.integers(6, 13), replace=False, p=chance / chance.sum())
        lines += [f"{user},{item},{titles[item]},{at + 1}" for at, item in enumerate(items)]
    source = folder / "source.csv"
    source.write_text("\n".join(lines) + "\n")
    return source


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A prepared folder: 40 users, 50 items, 5 clients."""
    folder = tmp_path_factory.mktemp("data")
    data = {
        "path": str(folder / "prepared"),
        "source": str(_write_source(folder)),
        "k_core": 1,
        "partition": {"kind": "kmeans", "num_clients": 5, "dim": 4, "epochs": 2},
    }
    tree = {**TINY, "data": data, "model": {**TINY["model"], "name": str(tiny_encoder)}}
    prepare(configs.parse(tree, "conftest"))
    return folder / "prepared"


@pytest.fixture(scope="session")
def tiny_writer(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Callable[[str], Path]
) -> Callable[..., RunConfig]:
    """`tiny_writer("qwen3", train={...})`: a config like `tiny_config` of a model that writes; two
    items have the titles of two others."""
    prepared: dict[str, dict[str, Any]] = {}
    shown = {
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "max_tokens": 192,
        "generation": {
            "template": "Chosen:\n{history}\nResponse:\n",
            "max_new_tokens": 8,
            "beams": 2,
            "at_once": 4,
        },
    }

    def make(family: str, **overrides: Any) -> RunConfig:
        folder = tmp_path_factory.mktemp("writer")
        if family not in prepared:
            source = _write_source(folder, num_users=20, num_items=30)
            lines = source.read_text().splitlines()
            titles = {line.split(",")[1]: line.split(",")[2] for line in lines[1:]}
            for new, old in (("4", "9"), ("7", "11")):
                lines = [
                    line.replace(f",{new},{titles[new]},", f",{new},{titles[old]},")
                    for line in lines
                ]
            source.write_text("\n".join(lines) + "\n")
            prepared[family] = {
                "path": str(folder / "prepared"),
                "source": str(source),
                "k_core": 1,
                "partition": {"kind": "kmeans", "num_clients": 3, "dim": 4, "epochs": 2},
            }
        place = {
            "name": "tiny",
            "storage": str(folder),
            "data": prepared[family],
            "model": {**shown, "name": str(tiny_decoder(family))},
            "train": {"local_samples": 8},
        }
        config = configs.parse(_merge(_merge(TINY, place), overrides), "tiny_writer")
        if not config.data.path.exists():
            prepare(config)
        return config

    return make


def _merge(tree: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in more.items():
        held = merged.get(key)
        nested = isinstance(value, dict) and isinstance(held, dict)
        merged[key] = _merge(held, value) if nested else value
    return merged


@pytest.fixture(scope="session")
def tiny_config(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, tiny_data: Path
) -> Callable[..., RunConfig]:
    """`tiny_config(train={"share": "none"})`: a config of seconds, with a storage of its own."""

    def make(**overrides: Any) -> RunConfig:
        place = {
            "name": "tiny",
            "storage": str(tmp_path_factory.mktemp("runs")),
            "data": {"path": str(tiny_data)},
            "model": {"name": str(tiny_encoder)},
        }
        return configs.parse(_merge(_merge(TINY, place), overrides), "tiny_config")

    return make


@dataclass
class Played:
    """A run in this process, round by round."""

    config: RunConfig
    rounds: Rounds
    outcomes: list[Outcome] = field(default_factory=list)
    ledger: list[list[LedgerRow]] = field(default_factory=list)
    events: list[list[str]] = field(default_factory=list)

    def hashes(self, round: int) -> dict[str, str]:
        """Of each learner's adapters, both sides."""
        return self.rounds.hashes(round, ["client.values", "trunk.values"], self.learners)

    @property
    def learners(self) -> list[str]:
        """Sorted."""
        return sorted(self.config.method.seat(Dataset(self.config.data.path).clients))

    def losses(self, round: int) -> dict[str, float]:
        """Of each learner."""
        reports = self.outcomes[round].reports
        assert reports is not None
        return dict(reports.losses)


@pytest.fixture(scope="session")
def play() -> Callable[..., Played]:
    """`play(config)`: the loop of jobs/train.py over actors in this process.

    `before(plant, t)` is called before each round; a run whose storage holds rounds goes on.
    """

    def run(
        config: RunConfig,
        before: Callable[[Plant, int], None] | None = None,
        last: int | None = None,
    ) -> Played:
        played = Played(config, Rounds(Storage(config.storage).sub(config.name)))
        latest = played.rounds.latest()
        first = 0 if latest is None else latest + 1
        with Plant.inline(config, survey(config), played.rounds) as plant:
            for t in range(first, (config.train.rounds if last is None else last) + 1):
                if before:
                    before(plant, t)
                outcome = plant.replayed(one_round, t, config)
                played.outcomes.append(outcome)
                played.ledger.append(plant.close_ledger())
                played.events.append(plant.take_events())
                played.rounds.commit(t, outcome.staged, {})
        return played

    return run
