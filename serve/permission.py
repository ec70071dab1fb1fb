"""Who may ask for whom: what a route checks of the caller that the gate let in.

It must not know what is asked for.
"""

from collections.abc import Callable, Sequence

from fastapi import Request

from fellray.serve.gate import CALLER
from fellray.serve.refusal import Refusal, refuse_client
from fellray.serve.tokens import Caller


def caller_of(request: Request) -> Caller:
    """Whose token the request carries."""
    caller: Caller = request.scope[CALLER]
    return caller


def check(
    request: Request, is_client: Callable[[str], bool], clients: Sequence[str], field: str
) -> None:
    """That the caller may ask for all of these clients, and that they are there.

    Who is nobody's client yet is answered to the operator, from the ladder's lower rungs.

    Raises:
        Refusal: one is another's, or is not there; `field` has `{}` for its place.
    """
    caller = caller_of(request)
    for place, client in enumerate(clients):
        if not caller.may_ask_for(client):
            raise Refusal(403, "not_allowed", "the token is another client's", field.format(place))
        if caller.client is not None and not is_client(client):
            raise refuse_client(field.format(place))


def refuse_clients(request: Request, why: str) -> None:
    """Raises:
    Refusal: the caller is not the operator.
    """
    if caller_of(request).client is not None:
        raise Refusal(403, "not_allowed", why)
