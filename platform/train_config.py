"""What a run can be told of its training: a client's steps, who takes part, how rounds are judged.

It must not know the methods, nor where anything runs.
"""

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from fellray.platform.section import Section


class TrainConfig(Section):
    """Local training and the rounds."""

    rounds: int = Field(default=10, ge=0)
    """How many times the loop in jobs/train.py turns."""
    local_samples: int = Field(default=96, ge=1)
    """Training histories one client reads in one round."""
    batch_size: int = Field(default=16, ge=1)
    """Histories in one local step of one client."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What takes a client's steps. `sgd` is theta - learning_rate * gradient, without momentum: for
    methods that are stated for it (scaffold needs it). It wants a larger learning rate than AdamW.
    """
    learning_rate: float = Field(default=3e-3, gt=0)
    """The optimizer's learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first decay."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's second decay."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    clip: float | None = Field(default=None, gt=0)
    """L2 bound on one client's gradient in a step, client and trunk side each; none by default. It
    bounds the loss's gradient; what a method corrects it by is added after."""
    moments: Literal["reset", "keep"] = "reset"
    """What AdamW's moments do when a round ends: start anew (default) or stay with the client."""
    share: Literal["all", "trunk_only", "none"] = "all"
    """What a client gives to the mixture: all its adapters; only the trunk's, which the server
    holds anyway; or none (then only the loss is sent)."""

    @model_validator(mode="after")
    def _keeps_what_there_is(self) -> Self:
        if self.moments == "keep" and self.optimizer != "adamw":
            raise ValueError(
                f"moments keep is for optimizer adamw, {self.optimizer} has none: use reset"
            )
        return self


class SamplingConfig(Section):
    """Which of the registered clients take part in a round."""

    per_round: int | None = Field(default=None, ge=1)
    """How many clients' answers a round needs. None: everybody takes part (with a trace, everybody
    who is available)."""
    kind: Literal["uniform", "by_size", "round_robin", "trace"] = "uniform"
    """Everybody alike; in proportion to the size of a client's training data; everybody in turn; or
    uniformly among those whom a trace calls available."""
    over_select: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """More clients are asked than needed: ceil(per_round * over_select). The first per_round
    answers within the deadline count, so above 1 a replay may count other answers. It makes up for
    those who are late; a round is the shorter for it only with a deadline, without one everybody
    asked is waited for."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds from when an actor begins, after which no further step begins in it. Its clients who
    are not done then are late and do not count (nor do those who train side by side with them, see
    `clients.slots`). None: everybody asked is waited for."""
    trace: Path | None = None
    """A Parquet file with the columns client (text), start, end (whole numbers): a client is
    available in the rounds start <= round < end. A client may have several rows."""

    @property
    def asked(self) -> int | None:
        """How many clients a round asks; None: all."""
        if self.per_round is None:
            return None
        # 10 * 1.1 is a little more than 11 in binary fractions
        return math.ceil(round(self.per_round * self.over_select, 6))

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.kind == "trace" and self.trace is None:
            raise ValueError("kind trace needs sampling.trace=<Parquet file>")
        if self.kind != "trace" and self.trace is not None:
            raise ValueError(f"trace is read by kind trace only, kind is {self.kind}")
        if self.per_round is None and self.kind in ("by_size", "round_robin"):
            raise ValueError(f"kind {self.kind} needs sampling.per_round=<number of clients>")
        if self.per_round is None and self.over_select > 1:
            raise ValueError(
                f"over_select {self.over_select:g} needs sampling.per_round=<number of clients>"
            )
        return self


class EvaluationConfig(Section):
    """Full ranking over all items, seen items masked."""

    every: int = Field(default=1, ge=1)
    """Validate after every this many rounds (and after the last)."""
    select: Literal["ndcg@10", "worst_ndcg@10", "auc", "gauc"] = "ndcg@10"
    """The best round: highest pooled validation NDCG@10, or highest of the worst client; of a run
    on attributes the highest AUC of all samples (`auc`), or of users, averaged (`gauc`)."""
    clients: int | None = Field(default=None, ge=1)
    """Evaluate (and export) at most this many clients, a seeded sample, the same in every round."""
    max_users: int | None = Field(default=None, ge=1)
    """Validate on at most this many users of each client; the test is always whole."""
