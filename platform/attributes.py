"""What a run on attributes can be told: its features, its users, how its backbone is pre-trained.

The backbone is an embedding per feature and a small MLP that foretells a click (FedPA, Zhang et
al., IJCAI 2024). This file must not know how clients adapt it: that is the method's.
"""

from typing import Self

from pydantic import Field, model_validator

from fellray.platform.section import Section


class Bins(Section):
    """How a number becomes a category: by equal steps of log(1 + value)."""

    low: float
    """log(1 + value) at the first edge."""
    high: float
    """log(1 + value) at the last edge."""
    edges: int = Field(default=99, ge=1)
    """Edges between the bins: one bin more than edges."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class OpenUsers(Section):
    """Whose interactions the backbone is pre-trained on; all others are clients."""

    attribute: str | None = None
    """A user feature; None: users are drawn alike."""
    values: tuple[str, ...] = ()
    """Its values, as text, that make a user likely to be open."""
    inside: float = Field(default=0.8, ge=0, le=1)
    """Share of the users with such a value who are open."""
    outside: float = Field(default=0.2, ge=0, le=1)
    """Share of all other users who are open."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the open users who are kept from pre-training: on them its epoch is chosen."""

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if (self.attribute is None) != (not self.values):
            raise ValueError("attribute and values go together: give both, or neither")
        return self


class Student(Section):
    """A smaller backbone, distilled from the pre-trained one; clients then adapt the student.

    Its loss on the open users is (1 - alpha) BCE(y, s) + alpha tau^2 BCE(teacher / tau, s / tau).
    """

    dim: int = Field(default=4, ge=1)
    """Width of its embeddings."""
    layers: tuple[int, ...] = (16, 4)
    """Widths of its hidden layers."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """How much the teacher counts against the clicks."""
    temperature: float = Field(default=2.0, gt=0)
    """tau."""


class AttributeConfig(Section):
    """A run on users' and items' attributes instead of a language model.

    `data.source` is a folder with interactions.parquet (user_id, item_id, timestamp, label 0 or 1),
    users.parquet and items.parquet; of `data` only `source`, `path` and `seed` are read.
    """

    users: tuple[str, ...] = Field(min_length=1)
    """Columns of users.parquet that are read, in the order of the model's input."""
    items: tuple[str, ...] = Field(min_length=1)
    """Columns of items.parquet that are read, behind those of the users."""
    bins: dict[str, Bins] = Field(default_factory=dict)
    """Columns that hold numbers, not categories, and their bins."""
    open: OpenUsers = OpenUsers()
    valid: float = Field(default=0.2, ge=0, lt=0.5)
    """Share of each client's interactions, by time, before its test, that is validation."""
    test: float = Field(default=0.2, ge=0, lt=0.5)
    """Share of each client's newest interactions that is test."""
    dim: int = Field(default=8, ge=1)
    """Width of an embedding."""
    layers: tuple[int, ...] = Field(default=(32, 8), min_length=1)
    """Widths of the hidden layers."""
    epochs: int = Field(default=30, ge=1)
    """Most passes of pre-training; the one with the best AUC on held-out open users is kept."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam's, in pre-training."""
    batch_size: int = Field(default=1024, ge=1)
    """Interactions in one step of pre-training."""
    student: Student | None = None
    """Distil a smaller backbone and use it; None: use the pre-trained one."""
    baseline: bool = True
    """Also train the row that a FedPA result must be read beside: private user embeddings alone,
    nothing sent."""

    @model_validator(mode="after")
    def _known_features(self) -> Self:
        for what, names in (("users", self.users), ("items", self.items)):
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(f"{what} names {twice[0]!r} twice")
        if strangers := sorted(self.bins.keys() - {*self.users, *self.items}):
            raise ValueError(f"bins names {strangers[0]!r}, which is no feature of users or items")
        if self.open.attribute is not None and self.open.attribute not in self.users:
            raise ValueError(
                f"open.attribute {self.open.attribute!r} is no user feature; known: "
                f"{', '.join(self.users)}"
            )
        return self
