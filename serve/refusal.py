"""A request that is not answered: what is wrong, where, and the HTTP status it stands for.

It must not know who asked, nor how the request arrived.
"""

from typing import Any


class Refusal(Exception):
    """An answer of status 4xx, or 503 where the fault is ours and passes."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        """For programs: stable."""
        self.message = message
        """For people. It repeats nothing of a request's body."""
        self.field = field
        """Where in the request, dotted."""

    def __reduce__(self) -> tuple[type["Refusal"], tuple[Any, ...]]:
        return Refusal, (self.status, self.code, self.message, self.field)

    def below(self, place: str) -> "Refusal":
        """The same, of one request among several."""
        field = f"{place}.{self.field}" if self.field else place
        return Refusal(self.status, self.code, self.message, field)

    def body(self) -> dict[str, Any]:
        """What goes out."""
        error = {"code": self.code, "message": self.message, "field": self.field}
        return {"error": error}
