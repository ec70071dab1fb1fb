"""The rule of local training: what a client's steps are corrected by, and what it keeps for that.

A method names its rule; both sides of the cut follow it alike, each on its own part of a client's
weights. What a client keeps beside its weights are vectors of their length, pages of a round like
them. It must not know who trains, nor where the vectors lie.

Shapes: S clients, P parameters of one client; every formula is elementwise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ANCHOR = "anchor"
"""The mixture beside the client's own weights."""
CONTROL = "control"
"""SCAFFOLD's c_i."""
SERVER_CONTROL = "server_control"
"""SCAFFOLD's c: one for everyone."""


@dataclass(frozen=True)
class LocalRule:
    """How a client trains in a round. By default plainly, from the mixture."""

    pull: float = 0.0
    """mu >= 0: every step's gradient gets mu * (theta - reference): the gradient of
    mu/2 ||theta - reference||^2. The reference is the anchor where there is one, else the weights
    at the start of the round."""
    anchored: bool = False
    """The mixture becomes an anchor and the weights stay the client's own; else it becomes the
    weights."""
    twin: bool = False
    """The anchor trains as well, first and without a pull, and what it comes to is sent in place of
    the weights, which are pulled to it as it was."""
    freezes_a: bool = False
    """Only the adapters' B train; A stays the seeded start that all clients share."""
    controls: bool = False
    """Every step's gradient g becomes g - c_i + c, with SCAFFOLD's control variates."""

    def __post_init__(self) -> None:
        assert self.pull >= 0, self.pull
        assert self.anchored or not self.twin, "a twin is what becomes of the anchor"
        assert not (self.controls and (self.anchored or self.freezes_a)), "one method at a time"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The vectors that a client keeps beside its weights."""
        return (ANCHOR,) * self.anchored + (CONTROL, SERVER_CONTROL) * self.controls

    @property
    def sent(self) -> str:
        """Which of a client's vectors the method mixes."""
        return ANCHOR if self.twin else "values"

    @property
    def received(self) -> tuple[str, ...]:
        """What a client is given at the end of a round, one after the other: the mixture first."""
        mixture = ANCHOR if self.anchored else "values"
        return (mixture, SERVER_CONTROL) if self.controls else (mixture,)

    @property
    def vectors(self) -> int:
        """How many vectors of the weights' length a client that trains needs for the rule."""
        return len(self.kinds) + self.remembers_start

    @property
    def remembers_start(self) -> bool:
        """Whether a step or the end of a round looks at the weights of the round's start."""
        return self.controls or (self.pull > 0 and not self.anchored)

    def refuse(self, optimizer: str, moments: str, share: str) -> str | None:
        """Why local training cannot follow this rule under these settings of `train`, and the way
        out; None where it can."""
        if self.controls and optimizer != "sgd":
            return (
                "its correction is in units of an SGD step, and AdamW would rescale it: "
                "set train.optimizer=sgd (and a learning rate for it)"
            )
        if self.kinds and share != "all":
            return f"needs the mixture of all adapters: set train.share=all, it is {share}"
        if self.twin and moments == "keep":
            return (
                "trains two models of each client, and only one would keep its moments: "
                "set train.moments=reset"
            )
        return None


PLAIN = LocalRule()
"""Nothing is corrected and nothing kept."""


def advance_control(
    control_SP: Tensor,
    server_control_SP: Tensor,
    start_SP: Tensor,
    values_SP: Tensor,
    steps_S: Tensor,
    learning_rate: float,
) -> Tensor:
    """c_i+ = c_i - c + (x - y_i) / (K_i lr) [S, P]: SCAFFOLD's option II (Karimireddy et al., ICML
    2020, equation 4). Who took no step keeps its c_i."""
    per_S = (steps_S.to(values_SP.dtype) * learning_rate)[:, None]
    moved_SP = (start_SP - values_SP) / per_S
    return torch.where(steps_S[:, None] > 0, control_SP - server_control_SP + moved_SP, control_SP)


def advance_server_control(
    server_control_P: Tensor,
    start_P: Tensor,
    mean_P: Tensor,
    weights_C: Tensor,
    registered: int,
) -> Tensor:
    """c+ = c + 1/N sum_i (c_i+ - c_i) [P] over those who took part (the same paper, equation 5).

    With option II the sum is sum_i (x - y_i) / (K_i lr) - |S| c: it follows from what clients send
    anyway, so no client sends its control variate.

    Args:
        server_control_P: c.
        start_P: x.
        mean_P: sum_i w_i y_i / sum_i w_i.
        weights_C: w_i = 1 / (K_i lr) of those who took part, fp64.
        registered: N.
    """
    moved_P = (start_P.double() - mean_P.double()) * weights_C.sum()
    change_P = (moved_P - len(weights_C) * server_control_P.double()) / registered
    return (server_control_P.double() + change_P).to(server_control_P.dtype)
