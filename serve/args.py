"""What a serving application can be told: one frozen model, checked before anything starts.

It must not know Ray. Where the application listens belongs to Serve and is said elsewhere.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Args(BaseModel):
    """The arguments of `fellray.serve.app.build`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: str = Field(min_length=1)
    """A run's folder or URI; every replica must reach it."""
    round: Literal["best", "latest"] | int = "best"
    """What is served until `fellray promote` says otherwise: the round with the best validation,
    or the last one. Both are followed while the run goes on. A number: this round and no other."""
    tokens: str | None = None
    """The folder or URI that holds `tokens.json`; by default the run's."""
    events: str | None = None
    """The folder, on a disk that all replicas share, for new interactions; by default the run's, or
    that of the run that this one continues."""
    recommenders: int = Field(default=1, ge=1)
    """Replicas of the private side: bottom, top, adapters, ranking."""
    most_recommenders: int | None = Field(default=None, ge=1)
    """Under load as many replicas as this; by default no more than `recommenders`. Load is more
    requests at once than half of `rows` for each replica, for half a minute."""
    trunks: int = Field(default=1, ge=1)
    """Replicas of the trunk."""
    most_trunks: int | None = Field(default=None, ge=1)
    """The same of trunks. Load is more than four batches at once for each."""
    threads: int = Field(default=1, ge=1)
    """Threads torch uses in each replica."""
    cpus: float = Field(default=1, ge=0)
    """CPUs Ray reserves for one replica."""
    recommender_gpus: float = Field(default=0, ge=0)
    """GPUs, or the fraction of one, that Ray reserves for one recommender."""
    trunk_gpus: float = Field(default=0, ge=0)
    """The same for one trunk."""
    adapters: int = Field(default=256, ge=1)
    """Clients whose adapters a replica holds; others are read when they are asked for."""
    shards: int = Field(default=256, ge=1)
    """Clients whose histories and counts a recommender holds."""
    rows: int = Field(default=128, ge=1)
    """Most histories in one batch, on either side of the cut; 1: nobody shares one."""
    waiting: int = Field(default=512, ge=1)
    """Requests that a replica has in hand at once; Serve holds the others back."""
    body_kib: int = Field(default=256, ge=1)
    """Largest request body."""
    rate: float = Field(default=200, gt=0)
    """Queries a second that one client, or one operator's token, may ask of a replica; those of a
    batch count each, and so does any other request."""
    burst: int = Field(default=400, ge=1)
    """Queries that may be asked at once before `rate` counts; a larger batch waits for a full
    bucket."""
    timeout_s: float = Field(default=30, gt=0)
    """After so long a request is given up."""
    poll_s: float = Field(default=0.5, gt=0)
    """How often a replica looks for a new round and for changed tokens."""

    @model_validator(mode="after")
    def _at_least_as_many(self) -> Self:
        for most, least in (("most_recommenders", "recommenders"), ("most_trunks", "trunks")):
            if (limit := getattr(self, most)) is not None and limit < getattr(self, least):
                raise ValueError(f"{most}={limit} is less than {least}={getattr(self, least)}")
        return self
