"""What a crew of learners does between two crossings: lessons, and rankings of held-out users.

One kind for models that make vectors, one for models that write. Neither knows where the trunk is,
nor what a round is.

Shapes: N rows of a step, S learners of the crew, L tokens of all rows, V tokens of the vocabulary,
I items, K shards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fellray.platform.decoder import Head
from fellray.platform.grounding import Grounding
from fellray.platform.messages import Activation
from fellray.platform.metrics import Evaluator
from fellray.platform.model_config import GenerationConfig
from fellray.platform.reader import Batch, Reader
from fellray.platform.retrieval import Scorer, mean_losses
from fellray.platform.rows import Rows
from fellray.platform.script import IGNORED, Script, pack_ids
from fellray.platform.search import search_beams, take_likeliest
from fellray.platform.span import Span, Trip
from fellray.platform.tower import Tower, Used
from fellray.platform.wire import Wire
from fellray.platform.writing import Writing


@dataclass(frozen=True)
class Desk:
    """The data of a crew: learners who train side by side."""

    reader: Reader
    scorer: Scorer
    wire: Wire

    def losses(
        self, tower: Tower, batch: Batch, target_N: Tensor, y_Ld: Tensor, used: Used
    ) -> Tensor:
        """Each learner's mean loss [S], from hidden states at the upper cut."""
        scores = self.scorer.score(tower.finish(batch.rows, y_Ld, used), batch.shard_N)
        return mean_losses(scores, target_N, batch.slot_N, len(self.reader.learners))

    def rank(
        self, tower: Tower, batch: Batch, slot_N: Tensor, header: Activation, span: Span
    ) -> Trip[Tensor]:
        """Scores of all items [N, I] for held-out users."""
        h_Ld, used = tower.rise(batch.rows, batch.ids_L, slot_N, False)
        output = yield span.forward(self.wire.send_activation(header, h_Ld))
        y_Ld = self.wire.read_output(output).to(h_Ld.device)
        return self.scorer.score(tower.finish(batch.rows, y_Ld, used), batch.shard_N)

    def judge(
        self,
        evaluator: Evaluator,
        scores_NI: Tensor,
        seen: Sequence[np.ndarray],
        truth: Sequence[np.ndarray],
    ) -> None:
        """Add held-out users to their client's score."""
        evaluator.add(scores_NI, seen, truth)


class LessonReader(Reader):
    """Prompts, with the title to write where somebody learns."""

    def __init__(self, script: Script, *args: Any):
        """Args: args: those of `Reader`."""
        super().__init__(*args)
        self._script = script
        self._at_once = self._config.model.generation.at_once

    def _batch(
        self,
        slots: np.ndarray,
        shards: np.ndarray,
        history_NH: np.ndarray,
        target_N: np.ndarray | None,
    ) -> Batch:
        label_L: Tensor | None = None
        if target_N is None:
            ids_L, lengths_N = pack_ids(self._script.prompts(history_NH))
        else:
            ids_L, label_L, lengths_N = self._script.lessons(history_NH, target_N)
            label_L = label_L.to(self._device)
        return Batch(
            torch.from_numpy(slots).to(self._device),
            torch.from_numpy(shards).to(self._device),
            Rows(lengths_N, self._config.model.pad_multiple, self._device),
            ids_L.to(self._device),
            label_L,
        )


@dataclass(frozen=True)
class WritingDesk(Desk):
    """A crew whose model writes the next title."""

    script: Script
    grounding: Grounding
    head: Head
    plain: Tower
    """The model without adapters, for embeddings."""
    multiple: int
    """The padding rule's."""
    rule: GenerationConfig

    def losses(
        self, tower: Tower, batch: Batch, target_N: Tensor, y_Ld: Tensor, used: Used
    ) -> Tensor:
        """Each learner's mean loss over its tokens that have a label."""
        del target_N
        assert batch.label_L is not None
        asked = (batch.label_L != IGNORED).nonzero().squeeze(1)
        states = tower.read(batch.rows, y_Ld, used)[asked]
        slot_L = batch.slot_N.repeat_interleave(batch.rows.lengths_N.to(batch.slot_N.device))
        return mean_losses(
            self.head(states), batch.label_L[asked], slot_L[asked], len(self.reader.learners)
        )

    def rank(
        self, tower: Tower, batch: Batch, slot_N: Tensor, header: Activation, span: Span
    ) -> Trip[Tensor]:
        """Minus the distances of all items from what is written; -inf where it is nothing."""
        writing = Writing(tower, header, slot_N, span.extend, self.wire, self.multiple)
        prompts, end = (batch.ids_L.cpu(), batch.rows.lengths_N), self.script.wording.end
        answers = yield from write(writing, self.head, *prompts, self.rule, end)
        titles = self.script.titles(self.script.read(answers))
        scores_NI = self.scorer.prior_KI.new_full(
            (len(titles), self.scorer.prior_KI.shape[1]), -torch.inf
        )
        said = [row for row, ids in enumerate(titles) if ids]
        if said:
            rows = torch.tensor(said).to(slot_N.device)
            header = replace(header, row_client_N=header.row_client_N[said])
            send, multiple = span.extend, self.multiple
            writing = Writing(
                self.plain, header, slot_N[rows], send, self.wire, multiple, plain=True
            )
            ids_L, lengths_N = pack_ids([titles[row] for row in said])
            vectors = yield from writing.extend(ids_L, lengths_N, None, goes_on=False)
            scores_NI[rows] = self.grounding.score(vectors)
        return scores_NI

    def judge(
        self,
        evaluator: Evaluator,
        scores_NI: Tensor,
        seen: Sequence[np.ndarray],
        truth: Sequence[np.ndarray],
    ) -> None:
        """Add held-out users, those to whom an empty answer recommends nothing too."""
        users = list(zip(seen, truth, strict=True))
        said = (scores_NI > -torch.inf).any(1).tolist()
        evaluator.miss([own[1] for own, found in zip(users, said, strict=True) if not found])
        heard = [own for own, found in zip(users, said, strict=True) if found]
        if heard:
            aims = [self.grounding.aim(relevant, known) for known, relevant in heard]
            evaluator.add(scores_NI[said], [known for known, _ in heard], aims)


def write(
    writing: Writing,
    head: Callable[[Tensor], Tensor],
    ids_L: Tensor,
    lengths_N: Tensor,
    rule: GenerationConfig,
    end: int,
) -> Trip[list[list[int]]]:
    """Answers to prompts: their tokens, the end of text included.

    Args:
        ids_L: the prompts, on the CPU.
        lengths_N: their lengths.
    """

    def step(token_R: Tensor, parent_R: Tensor) -> Trip[Tensor]:
        states = yield from writing.extend(token_R, torch.ones_like(token_R), parent_R)
        return head(states)

    states = yield from writing.extend(ids_L, lengths_N, None, rule.max_new_tokens > 1)
    logits, limit = head(states), rule.max_new_tokens
    if rule.beams == 1:
        return (yield from take_likeliest(logits, step, end, limit))
    return (yield from search_beams(logits, step, end, limit, rule.beams))
