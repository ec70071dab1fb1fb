"""What a run can be told of its data: where it comes from, how it is split, who is a client.

It must not know how interactions are read, nor how clients are found.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fellray.platform.section import Section, assume_kind


class LeaveOneOut(Section):
    """Each user's last interaction is the test item, the one before it the validation item."""

    kind: Literal["leave_one_out"] = "leave_one_out"


class Temporal(Section):
    """One clock for everybody: the newest interactions are the test set, those before validation.

    Needs real timestamps (unix seconds); a set whose order is only per user is refused.
    """

    kind: Literal["temporal"] = "temporal"
    valid: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of all interactions, by time, that go to validation."""
    test: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of all interactions, by time, that go to test."""


class KMeansPartition(Section):
    """KMeans on matrix-factorisation user embeddings of the training split, as FELLRec does."""

    kind: Literal["kmeans"] = "kmeans"
    num_clients: int = Field(default=5, ge=1)
    """How many clusters, that is clients."""
    dim: int = Field(default=64, ge=1)
    """Width of the user embeddings."""
    epochs: int = Field(default=20, ge=1)
    """Passes of BPR over the training split."""


class PerUser(Section):
    """One client per user: the cross-device setting."""

    kind: Literal["per_user"] = "per_user"


class ByAttribute(Section):
    """Users with the same value of one attribute are a client."""

    kind: Literal["by_attribute"] = "by_attribute"
    attribute: str
    """A column of the source's users, `gender` for example."""
    min_users: int = Field(default=10, ge=1)
    """A smaller group joins `other`, as do users without a value; where `other` is itself too
    small, the smallest groups join it as well."""


class DirichletPartition(Section):
    """Clients of equal size whose users differ in the category they met most (label skew).

    After Hsu, Qi, Brown (arXiv 1909.06335): a client's mix of labels is drawn from
    Dirichlet(alpha * p), where p is everybody's mix. Here a label belongs to a user.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    num_clients: int = Field(default=5, ge=1)
    """How many clients."""
    alpha: float = Field(default=0.5, gt=0, le=1e6)
    """Small: a client has users of one category or few. Large: every client has everybody's mix."""
    min_users: int = Field(default=2, ge=1)
    """Refuse to make clients of fewer users than this."""


AnyPartition = KMeansPartition | PerUser | ByAttribute | DirichletPartition


class DataConfig(Section):
    """Where interactions come from and how they are dealt to clients."""

    path: Path = Path("data/demo")
    """The prepared folder: `fellray prepare` writes it, everything else reads it."""
    source: str = "demo"
    """`demo` (made by fellray), a folder in fellray's schema, a MovieLens folder (`ml-100k`,
    `ml-1m`, `ml-32m` and others of their forms), RecBole's atomic files (the folder or the `.inter`
    file), Amazon reviews of 2018 or 2023 (the folder or the file of JSON lines, also `.gz`), or a
    Parquet or CSV file of interactions."""
    items: Path | None = None
    """A Parquet or CSV file of items, where `source` is a file that has no titles; of Amazon
    reviews the metadata, where they do not lie beside them."""
    users: Path | None = None
    """A Parquet or CSV file of users, where `source` is a table: `user_id`, and a column for each
    attribute. The other forms have their users' attributes beside them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column map of a Parquet, CSV or RecBole source: fellray's name -> the file's name, for
    `user_id`, `item_id`, `title`, `timestamp`, `rating`, `categories`."""
    min_rating: float | None = None
    """Drop interactions rated below this."""
    k_core: int = Field(default=5, ge=1)
    """Repeatedly drop users and items with fewer interactions than this (1: keep all)."""
    max_users: int | None = Field(default=None, ge=1)
    """Keep a seeded sample of this many users (before the k-core): a stated subsample."""
    split: Annotated[
        Annotated[LeaveOneOut | Temporal, Field(discriminator="kind")], assume_kind("leave_one_out")
    ] = LeaveOneOut()
    """How each history is divided into training, validation and test."""
    partition: Annotated[
        Annotated[AnyPartition, Field(discriminator="kind")], assume_kind("kmeans")
    ] = KMeansPartition()
    """Which users belong to which client."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything `prepare` draws."""
