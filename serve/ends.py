"""The private ends of the model: questions in, activations out; hidden states in, rankings out.

Bottom, top, adapters and item vectors of a run's clients. Whoever waits is answered together, each
with its own client's adapters at its own round. One thread at a time may call it. It must not know
how a request arrives, nor where the trunk is.

Shapes: N questions of one crossing, L real tokens, I items, T of them there in training, J later,
d width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig
from fellray.platform.encoder import Backbone
from fellray.platform.errors import FellrayError
from fellray.platform.messages import Activation, StaleLease
from fellray.platform.own import Own
from fellray.platform.retrieval import compare
from fellray.platform.rounds import Rounds
from fellray.platform.rows import Rows
from fellray.platform.slots import Slots
from fellray.platform.split import SIDES, cut_model, plan_cut
from fellray.platform.tower import Tower, Used
from fellray.platform.wire import Wire
from fellray.serve.items import Items
from fellray.serve.ranking import Choice, Ranking, rank


@dataclass(frozen=True)
class Question:
    """One user's history, and by whose adapters it is read."""

    round: int
    learner: str
    """Or a blend."""
    ids_L: Tensor
    """Token ids between the special tokens."""
    prior_T: Tensor | None
    """Added to the scores of the items that were there in training; later ones were never met."""
    items: Items
    """The catalogue as the asker found it."""
    width: int
    """Of that, how many items may be recommended: the first ones."""
    choice: Choice


@dataclass(eq=False)
class Crossing:
    """Questions of one round on their way through the trunk."""

    activation: Activation
    questions: Sequence[Question]
    rows: Rows
    used: Used = field(repr=False)
    """The adapters themselves: what replaces them in their slots meanwhile changes nothing here."""


class Ends:
    """Bottom and top of every client's model."""

    def __init__(
        self,
        config: RunConfig,
        backbone: Backbone,
        items: Items,
        rounds: Rounds,
        own: Own,
        kept: int,
        rows: int,
        device: torch.device,
    ):
        """Args: own: whose adapters have a rank of their own. kept: clients whose adapters are
        held. rows: most questions in a crossing. device: where they compute."""
        cut = plan_cut(backbone, config.model)
        prefixes = [prefix for side in SIDES for prefix in cut.prefixes(side)]
        parts = cut_model(backbone.select(prefixes), config.model)
        sites = cut.outer
        lora = config.model.lora
        self._ends = (parts.bottom.to(device), parts.top.to(device), items.tokens.pad)
        self._slots = Slots(
            lambda slots: Bank(sites, lora, None, slots, device),
            "client",
            False,
            rounds,
            own,
            kept,
        )
        self._rounds = rounds
        self._vectors_Td = items.vectors_Td.to(device)
        self._device = device
        self._config = config
        self._wire = Wire(config, backbone.dim, names=False)
        self._kept = kept
        self._rows = rows
        self.asked = 0
        """Questions that have risen so far."""

    @property
    def loaded(self) -> int:
        """Adapters that had to be read for them."""
        return self._slots.loaded

    @torch.no_grad()
    def rise(self, questions: Sequence[Question]) -> list[tuple[Crossing, int] | Exception]:
        """For each question the crossing it is part of, and its place there.

        Or why it cannot be read: a page of its round is gone or damaged (FellrayError).
        """
        order = sorted(range(len(questions)), key=lambda at: questions[at].round)
        found: dict[int, tuple[Crossing, int] | Exception] = {}
        for _, group in groupby(order, key=lambda at: questions[at].round):
            for few in self._deal(questions, list(group)):
                found |= zip(few, self._try([questions[at] for at in few]), strict=True)
        return [found[at] for at in range(len(questions))]

    @torch.no_grad()
    def finish(self, crossing: Crossing, output: np.ndarray) -> list[Ranking]:
        """Rankings of a crossing's questions, given hidden states at the upper cut [L, d]."""
        y_Ld = self._wire.read_output(output).to(self._device)
        u_Nd = self._tower().finish(crossing.rows, y_Ld, crossing.used)
        temperature = self._config.model.temperature
        scores_NI = compare(u_Nd, self._vectors_Td, temperature)
        # a product of its own, so that the others' scores stay the same, bit for bit
        later_Jd = max((q.items for q in crossing.questions), key=len).later_Jd
        if len(later_Jd):
            later_NJ = compare(u_Nd, later_Jd.to(self._device), temperature)
            scores_NI = torch.cat([scores_NI, later_NJ], 1)
        for scores_I, question in zip(scores_NI, crossing.questions, strict=True):
            if question.prior_T is not None:
                scores_I[: len(question.prior_T)] += question.prior_T.to(self._device)
            scores_I[question.width :] = -torch.inf
        return rank(scores_NI, [question.choice for question in crossing.questions])

    def _deal(self, questions: Sequence[Question], places: Sequence[int]) -> Iterator[list[int]]:
        """As many at a time as there are rows, and as there is room for adapters."""
        few: list[int] = []
        learners: set[str] = set()
        for at in places:
            learner = questions[at].learner
            if few and (len(few) == self._rows or len(learners | {learner}) > self._kept):
                yield few
                few, learners = [], set()
            few.append(at)
            learners.add(learner)
        yield few

    def _try(self, questions: Sequence[Question]) -> list[tuple[Crossing, int] | Exception]:
        """Together; where that fails, each on its own, so that one damaged page is one's own."""
        try:
            crossing = self._rise(questions)
        except (FellrayError, StaleLease) as error:
            self._rounds.look_again()  # the run may have decided on a damaged file
            if len(questions) == 1:
                return [error]
            return [self._try([question])[0] for question in questions]
        return [(crossing, place) for place in range(len(questions))]

    def _rise(self, questions: Sequence[Question]) -> Crossing:
        learners = sorted({question.learner for question in questions})
        place = {learner: at for at, learner in enumerate(learners)}
        own_N = torch.tensor([place[question.learner] for question in questions])
        lengths_N = torch.tensor([len(question.ids_L) for question in questions])
        ids_L = torch.cat([question.ids_L for question in questions])
        rows = Rows(lengths_N, self._config.model.pad_multiple, self._device)
        slots = self._slots.hold(questions[0].round, learners)
        self.asked += len(questions)
        slot_N = slots[own_N].to(self._device)
        h_Ld, used = self._tower().rise(rows, ids_L.to(self._device), slot_N, False)
        header = Activation(
            run=self._config.name,
            round=questions[0].round,
            step=0,
            lease=None,
            clients=tuple(learners),
            row_client_N=own_N.numpy().astype(np.int32),
            lengths_N=lengths_N.numpy().astype(np.int32),
            h_Ld=np.empty((0, 0), np.float32),
        )
        return Crossing(self._wire.send_activation(header, h_Ld), questions, rows, used)

    def _tower(self) -> Tower:
        return Tower(*self._ends, self._slots.bank, self._wire.pooled)
