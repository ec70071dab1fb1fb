"""What a model that writes is given to read, and how its answer is read: one template for both.

Prompt and answer become tokens each on its own, so that what is trained on is what generation goes
on from. Only clients have a `Script`: titles and token ids stay with them.

Shapes: N rows, H items of a history, L tokens of all rows together.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fellray.platform.encoder import Backbone, load_tokenizer
from fellray.platform.errors import FellrayError
from fellray.platform.model_config import ModelConfig

IGNORED = -100
"""A label that nobody asks for."""
INDENT = " " * 16
"""Of the published training template (`published_whitespace`)."""


@dataclass(frozen=True)
class Wording:
    """A decoder's tokenizer as data."""

    tokenizer: str
    """In the JSON of the tokenizers library."""
    start: tuple[int, ...]
    """What the tokenizer puts before a text."""
    end: int
    """End of text."""
    pad: int
    """Padding; it decides no number, since rows are padded at their end and nobody looks ahead."""


def load_wording(backbone: Backbone) -> Wording:
    """The tokenizer of a decoder.

    One without a padding token, or whose padding token the model has no embedding of, gets its end
    of text for one: labels are known by their places, so the end is learned all the same.

    Raises:
        FellrayError: it has no end of text, is not one of the tokenizers library, or has tokens
            that the model does not know.
    """
    name, known = backbone.name, int(backbone.config["vocab_size"])
    tokenizer: Any = load_tokenizer(name)
    end = tokenizer.eos_token_id
    if end is None:
        raise FellrayError(
            f"model.name {name}: its tokenizer has no end of text, so that no answer would end; "
            "name one as eos_token in its tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise FellrayError(
            f"model.name {name}: its tokenizer has no tokenizer.json; save it once with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    pad = tokenizer.pad_token_id
    largest = max({*tokenizer.get_vocab().values()} - {pad} | {end})
    if largest >= known:
        raise FellrayError(
            f"model.name {name}: its tokenizer has a token {largest}, the model embeddings for "
            f"{known}; give the folder the tokenizer that the model was trained with"
        )
    start = tuple(token for token in tokenizer("")["input_ids"] if token != end)
    pad = end if pad is None or pad >= known else int(pad)
    return Wording(tokenizer.backend_tokenizer.to_str(), start, int(end), pad)


class Script:
    """Prompts and answers over a catalogue's titles."""

    def __init__(self, wording: Wording, model: ModelConfig, titles: Sequence[str]):
        """Raises:
        FellrayError: prompt and answer have no room in `model.max_tokens`.
        """
        self.wording = wording
        self._tokenizer = Tokenizer.from_str(wording.tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._titles = titles
        self._rule = rule = model.generation
        self._room = model.max_tokens - rule.max_new_tokens
        self._template = {False: rule.template, True: rule.template}
        """For inference and for training."""
        if rule.published_whitespace:
            self._template[True] = INDENT + rule.template.replace("\n", "\n" + INDENT)
        least = max(len(ids) for ids in (self._prompt(t, [[]])[0] for t in (False, True)))
        if least > self._room:
            raise FellrayError(
                f"model.max_tokens={model.max_tokens}: the prompt without any title has {least} "
                f"tokens, the answer up to {rule.max_new_tokens} (model.generation.max_new_tokens);"
                f" set model.max_tokens to {least + rule.max_new_tokens} and room for titles"
            )

    def prompts(self, items_NH: np.ndarray, train: bool = False) -> list[list[int]]:
        """Token ids of prompts that leave room for an answer.

        Args:
            items_NH: item indices, newest last, -1 where a history is shorter. The oldest are left
                out where a prompt would be too long, all of them where one alone is.
        """
        histories = [[item for item in row if item >= 0] for row in items_NH.tolist()]
        found = self._prompt(train, histories)
        while long := [row for row, ids in enumerate(found) if len(ids) > self._room]:
            for row in long:
                histories[row] = histories[row][1:]
            for row, ids in zip(
                long, self._prompt(train, [histories[r] for r in long]), strict=True
            ):
                found[row] = ids
        return found

    def lessons(self, items_NH: np.ndarray, target_N: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts with their answers [L], their labels [L] and lengths [N].

        The last token is no input: nothing follows it.
        """
        prompts = self.prompts(items_NH, train=True)
        answers = self._encode([f'"{self._titles[item]}"' for item in target_N.tolist()])
        most = self._rule.max_new_tokens
        ids, labels, lengths = [], [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            answer = [*answer, self.wording.end][:most]
            whole = prompt + answer
            asked = whole[1:]
            if not self._rule.train_on_inputs:
                asked = [IGNORED] * (len(prompt) - 1) + answer
            ids += whole[:-1]
            labels += asked
            lengths.append(len(asked))
        return torch.tensor(ids), torch.tensor(labels), torch.tensor(lengths)

    def read(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The titles in answers; empty where there is none."""
        texts = self._tokenizer.decode_batch([list(ids) for ids in answers])
        if self._rule.published_whitespace:
            return [text.strip('"') for text in texts]
        return [text.strip().strip('"').strip() for text in texts]

    def titles(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of titles as they are embedded; none where a text is nothing."""
        start = list(self.wording.start)
        return [(start + ids)[: self._room] if ids else [] for ids in self._encode(texts)]

    def _prompt(self, train: bool, histories: Sequence[Sequence[int]]) -> list[list[int]]:
        quoted = [", ".join(f'"{self._titles[item]}"' for item in row) for row in histories]
        texts = [self._template[train].replace("{history}", titles) for titles in quoted]
        return [[*self.wording.start, *ids] for ids in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]


def pack_ids(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids of rows [L], one behind the other, and their lengths [N]."""
    flat = list(itertools.chain.from_iterable(rows))
    return torch.tensor(flat, dtype=torch.int64), torch.tensor([len(row) for row in rows])
