"""What noise is worth: epsilon and delta, what a run's clients have spent, and when none is stated.

An epsilon is stated for what the accountant knows whole: clipped updates with Gaussian noise, and
nothing of the client's beside them. It must not know how noise is drawn, nor who trains.

The bound is that of Gopi, Lee and Wutschitz (NeurIPS 2021) as Opacus computes it, from above.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.privacy_config import GaussianNoise, NoPrivacy, PaperLikeNoise

Unit = Literal["user", "client"]
"""Whose data may change as a whole: one user's, where each client is one user."""
_FINE = 0.005
"""Of epsilon: how far the bound may lie above it. Opacus' own default, 0.01, is absolute."""
_FINEST = 2e-5
"""As a difference: an epsilon below a thousand of these is next to nothing, and dear to compute."""
_WIDEST = 500.0
"""Above this epsilon, which says nothing any more, the wider bound is enough."""


@cache
def compute_epsilon(
    multiplier: float, delta: float, rounds: int = 1, sample_rate: float = 1.0
) -> float:
    """Epsilon of `rounds` Gaussian mechanisms; never below the truth, by a percent above.

    Args:
        multiplier: standard deviation of the noise, in units of the sensitivity.
        delta: the delta that epsilon belongs to.
        rounds: how often.
        sample_rate: below 1: in every round each client takes part with this probability,
            independently (Poisson), and whoever looks is not told who did. Then sensitivity means
            add or remove. A server that sees each client's upload is told: 1.
    """
    if not rounds:
        return 0.0
    if sample_rate == 1:
        # rounds of a Gaussian mechanism are exactly one with as much less noise
        multiplier, rounds = multiplier / math.sqrt(rounds), 1
    from opacus.accountants import PRVAccountant, RDPAccountant  # seconds to import

    history = [(multiplier, sample_rate, rounds)]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # log(0) at sample rate 1; orders at the edge
        wide, tight = RDPAccountant(), PRVAccountant()
        wide.history, tight.history = history, list(history)
        bound = float(wide.get_epsilon(delta))
        if bound > _WIDEST:
            return bound
        for _ in range(2):
            wider, fine = bound, min(max(bound * _FINE, _FINEST), 0.5)
            try:
                found = float(tight.get_epsilon(delta, eps_error=fine, delta_error=delta / 1000))
            except (RuntimeError, ValueError):  # its grid does not suit: the wider bound holds
                break
            bound = min(bound, found) if math.isfinite(found) else bound
            if bound > wider / 2:  # else far below what the grid was chosen for: finer
                break
    return bound


class Spending:
    """What the clients of a run have spent so far, and whether a round may still be begun.

    Every round in which a client is asked counts in full for it: the server sees who sends what, so
    that sampling hides nobody, whatever its kind.
    """

    def __init__(
        self,
        stage: NoPrivacy | GaussianNoise | PaperLikeNoise,
        unit: Unit,
        besides: Sequence[str] = (),
    ):
        """Args: besides: what leaves a client beside what went through the stage, in words."""
        self._stage = stage
        self._unit = unit
        self._rounds: Counter[str] = Counter()
        self.refusals = (*_refuse(stage), *besides)
        """Why no epsilon is stated; empty: one is."""
        self.stopped_before: int | None = None
        """The round that the budget does not allow."""
        self._budget = stage.epsilon if isinstance(stage, GaussianNoise) else None

    def check_budget(self) -> None:
        """See that a budget, where there is one, can be kept for a round.

        Raises:
            FellrayError: no epsilon is stated, or one round exceeds it.
        """
        if self._budget is None:
            return
        if self.refusals:
            raise FellrayError(
                f"privacy.epsilon={self._budget:g}: no epsilon is stated for this run, since "
                f"{'; '.join(self.refusals)}; leave privacy.epsilon out"
            )
        if (once := self._after(1)) > self._budget:
            raise FellrayError(
                f"privacy.epsilon={self._budget:g}: one round costs {once:.3f}; raise "
                "privacy.sigma, privacy.delta or the budget"
            )

    def take_part(self, clients: Iterable[str]) -> None:
        """They were asked in a round, whether their answer counted or not."""
        self._rounds.update(clients)

    @property
    def most(self) -> int:
        """Rounds of the client that was asked most often."""
        return max(self._rounds.values(), default=0)

    @property
    def epsilon(self) -> float | None:
        """Of the client that was asked most often; None: none is stated, see `refusals`."""
        return None if self.refusals else self._after(self.most)

    def affordable(
        self, rounds: Iterable[int], sample: Callable[[int], Sequence[str]]
    ) -> Iterator[int]:
        """The rounds, up to the one in which a client would exceed the budget.

        Args:
            sample: who will be asked in a round. Nobody is in round 0, the start.
        """
        self.stopped_before = None
        for round in rounds:
            if self._budget is not None and round > 0:
                most = max((self._rounds[client] for client in sample(round)), default=0)
                if self._after(most + 1) > self._budget:
                    self.stopped_before = round
                    return
            yield round

    @property
    def stop(self) -> str | None:
        """That the budget ended the run, in words."""
        if self.stopped_before is None:
            return None
        return (
            f"stopped before round {self.stopped_before}: it would exceed the budget "
            f"privacy.epsilon={self._budget:g} ({self.describe()}); with a larger one the same "
            "command goes on"
        )

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl: after this round."""
        delta = self._stage.delta if isinstance(self._stage, GaussianNoise) else None
        return {"epsilon": self.epsilon, "delta": delta, "most_rounds": self.most}

    def tree(self) -> dict[str, Any]:
        """For summary.json: what was done, what it is worth, and under which assumptions."""
        stage = self._stage
        tree: dict[str, Any] = {
            "mechanism": stage.kind,
            "statement": self.describe(),
            "epsilon": self.epsilon,
            "no_epsilon_because": list(self.refusals),
            "stopped_before": self.stopped_before,
        }
        if not isinstance(stage, NoPrivacy):
            tree |= self.row() | {"unit": self._unit}
        if isinstance(stage, PaperLikeNoise):
            tree["scale"] = stage.scale
        if isinstance(stage, GaussianNoise):
            tree |= {
                "clip": stage.clip,
                "sigma": stage.sigma,
                "loss_clip": stage.loss_clip,
                "loss_sigma": stage.loss_sigma,
                "neighbours": stage.neighbours,
                "sensitivity": _reach(stage) * stage.clip,
                "noise_multiplier": self._multiplier,
                "sampling": "no amplification: the server sees who sends",
                "noise_from": "seed" if stage.key is None else "key",
                "budget": self._budget,
            }
        return tree

    def describe(self) -> str:
        """One sentence for people."""
        stage = self._stage
        if isinstance(stage, NoPrivacy):
            return "no noise, no epsilon"
        if self.refusals or not isinstance(stage, GaussianNoise):
            return f"noise, but no formal epsilon: {'; '.join(self.refusals)}"
        relation = "replaced by any other" if stage.neighbours == "replace" else "left out"
        seed = (
            ", for whoever does not know the seed that the noise follows from"
            if stage.key is None
            else ""
        )
        return (
            f"epsilon {self._after(self.most):.3f} at delta {stage.delta:g}, per {self._unit}, its "
            f"data {relation} (L2 sensitivity {_reach(stage) * stage.clip:g}, noise "
            f"{stage.sigma * stage.clip:g}), {self.most} rounds at most, all counted in full"
            f"{seed}; of what training sends, not of evaluation scores nor of sample counts"
        )

    @property
    def _multiplier(self) -> float:
        """Noise over sensitivity of one round, update and loss together."""
        stage = self._stage
        assert isinstance(stage, GaussianNoise)
        leak = (_reach(stage) / stage.sigma) ** 2
        if stage.loss_sigma is not None:  # a loss in [0, clip] moves by clip at most
            leak += stage.loss_sigma**-2
        return 1 / math.sqrt(leak)

    def _after(self, rounds: int) -> float:
        assert isinstance(self._stage, GaussianNoise)
        return compute_epsilon(self._multiplier, self._stage.delta, rounds)


def open_account(
    config: RunConfig, rows: Iterable[Mapping[str, Any]] = (), continues: bool = False
) -> Spending:
    """The spending of a run after the rounds that its records tell of.

    Args:
        rows: of metrics.jsonl, each round once.
        continues: the run began with the state of another one, whose rounds are not in `rows`.

    """
    alone = config.attributes is not None or config.data.partition.kind == "per_user"
    unit: Unit = "user" if alone else "client"
    besides = () if isinstance(config.privacy, NoPrivacy) else sent_besides(config)
    if continues:
        besides += ("the run goes on from another one, whose rounds are not counted here",)
    spending = Spending(config.privacy, unit, besides)
    for row in rows:
        spending.take_part([*row.get("losses", ()), *row.get("late", ())])
    return spending


def sent_besides(config: RunConfig) -> tuple[str, ...]:
    """What leaves a client of this run in the clear, beside its upload at a round's end."""
    if config.attributes is not None:  # no server computes for it
        return ()
    return (
        "every step sends activations and their gradients to the server, in the clear, and the "
        f"server makes the trunk's adapters of them (model.cut={config.model.cut})",
    )


def _refuse(stage: NoPrivacy | GaussianNoise | PaperLikeNoise) -> tuple[str, ...]:
    if isinstance(stage, NoPrivacy):
        return ("privacy.kind is none",)
    if isinstance(stage, PaperLikeNoise):
        return ("privacy.kind paper_like clips nothing, so that one client's update has no bound",)
    return ()


def _reach(stage: GaussianNoise) -> int:
    """How many times the clip two neighbours' updates may lie apart."""
    return 2 if stage.neighbours == "replace" else 1
