"""A request that is not answered: what is wrong, where, and the HTTP status it stands for.

It must not know who asked, nor how the request arrived.
"""

from typing import Any

from fellray.serve.schema import Refused

_WORDS = {
    401: "The token is missing or wrong.",
    403: "The token is another client's.",
    404: "Something that was named is not there.",
    408: "The body did not come.",
    409: "It is there already and says something else, or there is no room.",
    413: "The body is too large.",
    415: "The body is said to be something other than JSON.",
    422: "The request is not what the schema says.",
    429: "Too many requests with this token.",
    503: "The service cannot answer now.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: that a route may answer so."""
    return {status: {"model": Refused, "description": _WORDS[status]} for status in statuses}


def refusals_of_text(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a route that answers with a text; what it refuses is told in JSON too."""
    kind = {"application/json": {"schema": {"$ref": f"#/components/schemas/{Refused.__name__}"}}}
    return {status: {"description": _WORDS[status], "content": kind} for status in statuses}


def refuse_client(field: str) -> "Refusal":
    """That the client which is named in this place is none of the run's."""
    return Refusal(404, "unknown_client", "the run has no such client", field)


class Refusal(Exception):
    """An answer of status 4xx, or 503 where the fault is ours and passes."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        field: str | None = None,
        wait_s: float = 1.0,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        """For programs: stable."""
        self.message = message
        """For people. It repeats nothing of a request's body."""
        self.field = field
        """Where in the request, dotted."""
        self.wait_s = wait_s
        """After so long it may be asked again, where that may help."""

    def __reduce__(self) -> tuple[type["Refusal"], tuple[Any, ...]]:
        return Refusal, (self.status, self.code, self.message, self.field, self.wait_s)

    def below(self, place: str) -> "Refusal":
        """The same, of one request among several."""
        field = f"{place}.{self.field}" if self.field else place
        return Refusal(self.status, self.code, self.message, field, self.wait_s)

    def body(self) -> dict[str, Any]:
        """What goes out."""
        error = {"code": self.code, "message": self.message, "field": self.field}
        return {"error": error}
