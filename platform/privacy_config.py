"""What a run can be told of privacy: the noise that a client's upload gets before it leaves.

It must not know how noise is drawn, nor what it comes to.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from fellray.platform.section import Section


class NoPrivacy(Section):
    """What a client sends, it sends as it is."""

    kind: Literal["none"] = "none"


class PaperLikeNoise(Section):
    """Laplace noise on every number of the upload, nothing clipped: no formal epsilon.

    What the code of FedPA's authors does elsewhere (GPFedRec, `--dp`); for comparison only.
    """

    kind: Literal["paper_like"] = "paper_like"
    scale: float = Field(gt=0, allow_inf_nan=False)
    """b of Laplace(0, b)."""
    key: Path | None = None
    """As of `gaussian`."""


class GaussianNoise(Section):
    """Local differential privacy: each client's round, sent minus start, is clipped and noised."""

    kind: Literal["gaussian"] = "gaussian"
    clip: float = Field(gt=0, allow_inf_nan=False)
    """C: L2 bound on what a client's round may change, over all it sends together."""
    sigma: float = Field(gt=0, allow_inf_nan=False)
    """Every number sent gets noise of standard deviation sigma * clip. Against `replace` the noise
    multiplier is half of sigma, as a replaced upload may be 2 * clip away."""
    delta: float = Field(default=1e-5, ge=1e-12, lt=0.5)
    """The delta that epsilon belongs to; below 1 / (number of clients)."""
    neighbours: Literal["replace", "add_or_remove"] = "replace"
    """What must look alike: any two sets of data of the client (sensitivity 2 * clip, what local
    differential privacy means), or the client's upload and an upload of zeros (clip)."""
    epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Budget of a client over all rounds it is asked in. The run ends before the round in which a
    client would exceed it. None: no bound."""
    loss_clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The mean training loss is sent clipped to [0, loss_clip] and noised, for methods that look at
    it. None: it is not sent at all."""
    loss_sigma: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The loss's noise has standard deviation loss_sigma * loss_clip; it counts in epsilon."""
    key: Path | None = None
    """A file of 32 bytes or more on every client's machine, from which the noise is drawn and which
    nobody else has. It must stay the same while the run lasts. None: the noise follows from `seed`,
    for research: whoever knows the config can take it off again."""

    @model_validator(mode="after")
    def _loss_is_whole(self) -> Self:
        if (self.loss_clip is None) != (self.loss_sigma is None):
            raise ValueError("loss_clip and loss_sigma go together: set both, or neither")
        return self
