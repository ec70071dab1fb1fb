"""A section of the config: what all of them have in common. It must not know any of them."""

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """Frozen, and deaf to misspelt keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def assume_kind(default: str) -> BeforeValidator:
    """A section that names no `kind` means the default one."""
    return BeforeValidator(
        lambda value: {"kind": default, **value} if isinstance(value, dict) else value
    )
