"""Grounding against a brute-force reference, and what a script makes of titles and answers.

Shapes: N answers, I items, d width.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fellray.platform.desk import WritingDesk
from fellray.platform.encoder import Backbone, load_backbone
from fellray.platform.errors import FellrayError
from fellray.platform.grounding import Grounding, embed_titles
from fellray.platform.metrics import Evaluator
from fellray.platform.model_config import ModelConfig
from fellray.platform.script import IGNORED, INDENT, Script, load_wording
from fellray.platform.split import cut_model

TITLES = ["word01", "word02 word03", "word01", "word04", "word05", "word02 word03", "word01"]
Make = Callable[[str], Path]
TEMPLATE = "Chosen:\n{history}\nResponse:\n"


def script(
    backbone: Backbone, titles: list[str] = TITLES, tokens: int = 160, **rule: Any
) -> Script:
    generation = {"template": TEMPLATE, "max_new_tokens": 8, **rule}
    model = ModelConfig.model_validate({"max_tokens": tokens, "generation": generation})
    return Script(load_wording(backbone), model, titles)


@pytest.fixture
def backbone(tiny_decoder: Make) -> Backbone:
    return load_backbone(str(tiny_decoder("llama")))


# --- embeddings and ranks -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_embedding_is_the_last_state_of_the_last_token(family: str, tiny_decoder: Make) -> None:
    """By transformers alone, one title at a time."""
    folder = tiny_decoder(family)
    backbone, tokenizer = load_backbone(str(folder)), AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    lora = {"target_modules": ["q_proj"]}
    parts = cut_model(backbone, ModelConfig.model_validate({"lora": lora}))
    ids = script(backbone).titles(TITLES)
    (found,) = embed_titles(parts, ids, 16, 0)
    for title, vector in zip(TITLES, found, strict=True):
        with torch.no_grad():
            inputs = tokenizer(title, return_tensors="pt")["input_ids"]
            wanted = theirs(inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        np.testing.assert_allclose(vector, wanted.numpy(), atol=2e-5)
    with pytest.raises(FellrayError, match=r"item 1 .*makes nothing of its title"):
        next(embed_titles(parts, [[1], []], 16, 0))


def ranks(grounding: Grounding, answer_Nd: torch.Tensor, truth: Any, seen: Any) -> dict[str, float]:
    evaluator = Evaluator(len(TITLES))
    aimed = [grounding.aim(t, s) for t, s in zip(truth, seen, strict=True)]
    evaluator.add(grounding.score(answer_Nd), seen, aimed)
    return evaluator.score().means()


def test_ranks_are_those_of_brute_force() -> None:
    """Seen items masked; a held-out item at the best place among candidates of its title."""
    draw = np.random.default_rng(3)
    own = {title: draw.normal(size=4) for title in sorted(set(TITLES))}
    vectors = np.stack([own[title] for title in TITLES]).astype(np.float32)
    grounding = Grounding(TITLES, torch.from_numpy(vectors))
    answers = draw.normal(size=(200, 4)).astype(np.float32)
    found, wanted = [], []
    for answer in answers:
        truth = draw.choice(7, size=1)
        seen = np.setdiff1d(draw.choice(7, size=draw.integers(0, 5), replace=False), truth)
        got = ranks(grounding, torch.from_numpy(answer)[None], [truth], [seen])
        found.append(round(1 / got["mrr@20"]))
        distance = [float(np.sqrt(((answer - v).astype(float) ** 2).sum())) for v in vectors]
        order = sorted(set(range(7)) - set(seen.tolist()), key=lambda i: (distance[i], i))
        alike = [order.index(i) + 1 for i in order if TITLES[i] == TITLES[truth[0]]]
        wanted.append(min(alike))
    assert found == wanted
    assert len(set(wanted)) == 7


def test_one_title_is_one_distance() -> None:
    """To the bit, though the vectors of a table may differ in their last one."""
    vectors = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    grounding = Grounding(TITLES, vectors)
    scores = grounding.score(torch.randn(5, 64, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(scores[:, 0], scores[:, 2])
    assert torch.equal(scores[:, 0], scores[:, 6])
    assert torch.equal(scores[:, 1], scores[:, 5])
    exact = torch.cdist(scores.new_zeros(1, 64), vectors)
    torch.testing.assert_close(
        grounding.score(scores.new_zeros(1, 64))[0, [0, 1, 3, 4]], -exact[0, [0, 1, 3, 4]]
    )


def test_aims() -> None:
    grounding = Grounding(TITLES, torch.zeros(7, 2))

    def aim(truth: list[int], seen: list[int]) -> list[int]:
        return grounding.aim(np.array(truth, np.int32), np.array(seen, np.int32)).tolist()

    assert aim([3], [0]) == [3]
    assert aim([6], []) == [0]
    assert aim([6], [0]) == [2]
    assert aim([6], [0, 2]) == [6]
    assert aim([2, 6], []) == [0, 2], "two items of one title take two places"
    assert aim([5, 6, 4], [1]) == [0, 4, 5]


def test_who_is_recommended_nothing_counts_as_missed() -> None:
    """An empty answer among others: a user of zeros, no item recommended."""
    grounding = Grounding(TITLES, torch.zeros(7, 2))
    only: Any = SimpleNamespace(grounding=grounding)
    scores = torch.full((2, 7), -torch.inf)
    scores[1] = -torch.arange(7.0)
    nobody, first = np.array([], np.int32), np.array([0], np.int32)
    evaluator = Evaluator(7)
    WritingDesk.judge(only, evaluator, scores, [nobody] * 2, [first] * 2)
    means = evaluator.score().means()
    assert means["recall@5"] == means["ndcg@20"] == means["hit@5"] == 0.5
    silent = Evaluator(7)
    WritingDesk.judge(only, silent, scores[:1], [nobody], [first])
    assert silent.score().users == 1
    assert set(silent.score().means().values()) == {0.0}


# --- prompts and answers ------------------------------------------------------------------------


def test_one_template_for_both(backbone: Backbone, tiny_decoder: Make) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder("llama"))
    s = script(backbone)
    history = np.array([[-1, 0, 1], [-1, -1, 4]])
    prompts = s.prompts(history)
    text = 'Chosen:\n"word01", "word02 word03"\nResponse:\n'
    assert tokenizer.decode(prompts[0]) == "<bos>" + text
    ids, labels, lengths = s.lessons(history, np.array([3, 0]))
    first = ids[: lengths[0]].tolist()
    assert first[: len(prompts[0])] == prompts[0]
    asked = labels[: lengths[0]].tolist()
    answer = [label for label in asked if label != IGNORED]
    assert tokenizer.decode(answer) == '"word04"<|endoftext|>'
    assert asked[: len(prompts[0]) - 1] == [IGNORED] * (len(prompts[0]) - 1)
    assert first[len(prompts[0]) :] == answer[:-1]
    everything, wide, same = script(backbone, train_on_inputs=True).lessons(
        history, np.array([3, 0])
    )
    assert torch.equal(everything, ids)
    assert torch.equal(same, lengths)
    assert wide[: lengths[0]].tolist() == [*first[1:], s.wording.end]


def test_published_whitespace(backbone: Backbone, tiny_decoder: Make) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder("llama"))
    s, history = script(backbone, published_whitespace=True), np.array([[0]])
    (prompt,) = s.prompts(history)
    (lesson,) = s.prompts(history, train=True)
    assert tokenizer.decode(prompt) == '<bos>Chosen:\n"word01"\nResponse:\n'
    assert (
        tokenizer.decode(lesson)
        == f'<bos>{INDENT}Chosen:\n{INDENT}"word01"\n{INDENT}Response:\n{INDENT}'
    )
    answer = tokenizer(f'{INDENT}"word04"', add_special_tokens=False)["input_ids"]
    assert s.read([answer]) == [f'{INDENT}"word04']
    assert script(backbone).read([answer]) == ["word04"]


def test_answers_of_nothing(backbone: Backbone, tiny_decoder: Make) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder("llama"))
    s = script(backbone)
    texts = ["", '""', ' "\n', "  ", '"a" b"']
    answers = [tokenizer(t, add_special_tokens=False)["input_ids"] + [s.wording.end] for t in texts]
    read = s.read([[s.wording.end], *answers])
    assert read == ["", "", "", "", "", 'a" b']
    assert [bool(ids) for ids in s.titles(read)] == [False] * 5 + [True]


def test_the_oldest_are_left_out(backbone: Backbone) -> None:
    titles = [f"word{i:02d} word{i:02d}" for i in range(10)]
    whole = script(backbone, titles, 160)
    history = np.arange(9)[None]
    counts = []
    for tokens in (48, 64, 80):
        (prompt,) = script(backbone, titles, tokens).prompts(history)
        assert len(prompt) <= tokens - 8
        kept = next(k for k in range(10) if whole.prompts(history[:, k:])[0] == prompt)
        assert kept == 0 or len(whole.prompts(history[:, kept - 1 :])[0]) > tokens - 8
        counts.append(9 - kept)
    assert counts == sorted(set(counts))
    (alone,) = script(backbone, ["word01 " * 90], 112).prompts(np.array([[0]]))
    assert alone == script(backbone, titles, 112).prompts(np.array([[-1]]))[0]


def test_long_titles_are_cut_off(backbone: Backbone) -> None:
    s = script(backbone, ["word01 word02 word03 word04", "word05"])
    _, labels, _ = s.lessons(np.array([[1], [1]]), np.array([0, 1]))
    asked = labels[labels != IGNORED].tolist()
    assert len(asked[:8]) == 8
    assert s.wording.end not in asked[:8]
    assert asked[-1] == s.wording.end


def test_no_room_is_refused(backbone: Backbone) -> None:
    with pytest.raises(FellrayError, match=r"max_tokens=16: the prompt without any title has \d+"):
        script(backbone, tokens=16)


def test_tokenizers_that_cannot_be_used(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tiny_decoder: Make
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder("llama"))
    assert tokenizer.pad_token is None
    assert load_wording(backbone).pad == tokenizer.eos_token_id
    narrow = Backbone("narrow", "", backbone.config | {"vocab_size": 200}, {})
    monkeypatch.setattr("fellray.platform.script.load_tokenizer", lambda name: tokenizer)
    with pytest.raises(FellrayError, match=r"narrow: its tokenizer has a token 329.* for 200"):
        load_wording(narrow)
    added = AutoTokenizer.from_pretrained(tiny_decoder("llama"), pad_token="[PAD]")
    monkeypatch.setattr("fellray.platform.script.load_tokenizer", lambda name: added)
    assert added.pad_token_id == 330
    assert load_wording(backbone).pad == tokenizer.eos_token_id
    slow = SimpleNamespace(eos_token_id=1, is_fast=False)
    monkeypatch.setattr("fellray.platform.script.load_tokenizer", lambda name: slow)
    with pytest.raises(FellrayError, match=r"no tokenizer.json"):
        load_wording(backbone)
    tokenizer.eos_token = None
    monkeypatch.setattr("fellray.platform.script.load_tokenizer", lambda name: tokenizer)
    with pytest.raises(FellrayError, match=r"no end of text.*eos_token in its tokenizer_config"):
        load_wording(backbone)
