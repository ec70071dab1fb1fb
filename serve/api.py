"""The HTTP API, version 1: routes, what they take and answer, and the OpenAPI document.

Every answer that is none has one shape, `{"error": {code, message, field}}`. It must not know how a
ranking comes about, nor Ray.
"""

import json
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match

import fellray
from fellray.platform.run import read_run
from fellray.serve.args import Args
from fellray.serve.browse import add_browsing
from fellray.serve.counters import Counters
from fellray.serve.gate import Gate, charge, headers_of
from fellray.serve.page import add_page
from fellray.serve.permission import caller_of, check, refuse_clients
from fellray.serve.recommender import Recommender
from fellray.serve.refusal import Refusal, refusals, refusals_of_text
from fellray.serve.schema import (
    MOST_WHOLE,
    Answer,
    Answers,
    ClientState,
    Item,
    NewEvents,
    Queries,
    Query,
    Receipt,
    RunStates,
    State,
    Whole,
    Written,
)
from fellray.serve.tokens import Bucket, Tokens


def make_api(
    recommender: Recommender,
    args: Args,
    tokens: Callable[[], Tokens],
    labels: dict[str, str],
) -> FastAPI:
    """The application. Args: tokens: those that count now. labels: name this replica's counters."""
    api = FastAPI(
        title="fellray",
        version=fellray.__version__,
        # their pages load scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    api.router.route_class = _Route
    counters, bucket = Counters(), Bucket(args.rate, args.burst)
    asked = [Depends(HTTPBearer(auto_error=False, description="A token of one client, or all."))]
    guarded = refusals(401, 403, 404, 413, 415, 422, 429, 503)

    @api.post("/v1/recommend", dependencies=asked, responses=guarded)
    async def recommend(query: Query, request: Request) -> Answer:
        """The best items for one user."""
        check(request, recommender.has_client, [query.client], "client")
        (answer,) = await recommender.recommend([query])
        return answer

    @api.post("/v1/recommend/batch", dependencies=asked, responses=guarded)
    async def recommend_batch(queries: Queries, request: Request) -> Answers:
        """The same for many users, all from one round; one that cannot be answered refuses all."""
        clients = [query.client for query in queries.queries]
        check(request, recommender.has_client, clients, "queries.{}.client")
        charge(bucket, caller_of(request), len(clients), counted=1)
        return Answers(answers=await recommender.recommend(queries.queries))

    @api.post("/v1/events", dependencies=asked, responses=guarded | refusals(409))
    async def add_events(body: NewEvents, request: Request) -> Receipt:
        """New interactions: stored once each, and part of their users' next request."""
        clients = [event.client for event in body.events]
        check(request, recommender.has_client, clients, "events.{}.client")
        return await recommender.events.add(body.events)

    @api.get("/v1/items/{id}", dependencies=asked, responses=refusals(401, 404, 413, 422, 429))
    async def find_item(id: Annotated[Whole, Written, Path()]) -> Item:
        """An item of the catalogue."""
        return recommender.find_item(id)

    @api.get(
        "/v1/clients/{id}", dependencies=asked, responses=refusals(401, 403, 404, 413, 429, 503)
    )
    async def find_client(id: str, request: Request) -> ClientState:
        """A client of the run."""
        check(request, recommender.has_client, [id], "id")
        return await recommender.find_client(id)

    @api.get("/v1/runs", dependencies=asked, responses=refusals(401, 413, 429))
    async def list_runs() -> RunStates:
        """What is served."""
        return RunStates(runs=[recommender.describe()])

    @api.get("/healthz", responses=refusals(413))
    async def live() -> State:
        """Whether the service lives."""
        return State(status="ok")

    @api.get("/readyz", responses=refusals(413, 503))
    async def ready() -> State:
        """Whether the trunk answers too."""
        await recommender.check()
        return State(status="ok")

    @api.get(
        "/metrics",
        dependencies=asked,
        response_class=PlainTextResponse,
        responses=refusals_of_text(401, 403, 413, 429),
    )
    async def metrics(request: Request) -> PlainTextResponse:
        """What this replica counted, for Prometheus; an operator's token is asked for."""
        refuse_clients(request, "metrics are the operator's")
        text = counters.render(recommender.gauges(), labels, recommender.totals())
        return PlainTextResponse(text, media_type=_PROMETHEUS)

    add_browsing(api, recommender, read_run(args.run), counters, args, labels, asked)
    add_page(api)
    _explain(api)
    api.openapi = _describe(api.openapi)  # type: ignore[method-assign]  # FastAPI's own way
    api.add_middleware(
        Gate,
        tokens=tokens,
        bucket=bucket,
        counters=counters,
        body_bytes=args.body_kib * 1024,
    )
    return api


def _describe(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """FastAPI writes bounds as floats, of which none is 2 ** 63 - 1."""

    def mend(tree: Any) -> Any:
        if isinstance(tree, list):
            return [mend(one) for one in tree]
        if not isinstance(tree, dict):
            return tree
        whole = {key: mend(one) for key, one in tree.items()}
        for key in ("minimum", "maximum"):
            if isinstance(bound := whole.get(key), float):
                whole[key] = min(int(bound), MOST_WHOLE)
        return whole

    @cache
    def describe() -> dict[str, Any]:
        document: dict[str, Any] = mend(make())
        return document

    return describe


class _Strict(Request):
    """A request whose JSON says nothing twice: of two values of one key the first would be lost."""

    async def json(self) -> Any:
        """The body."""
        return json.loads(await self.body(), object_pairs_hook=_make_object)


class _Route(APIRoute):
    """A route that reads JSON strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI asks for it."""
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await answer(_Strict(request.scope, request.receive))

        return handle


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise json.JSONDecodeError(_TWICE, "", 0)  # what FastAPI takes for a body that is wrong
    return made


_TWICE = "an object of the body has a key twice"
_BRANCHES = ("ByUser", "ByHistory", "int", "str", "constrained-int", "constrained-str")
_PROMETHEUS = "text/plain; version=0.0.4"


def _explain(api: FastAPI) -> None:
    """Errors in the one shape. Nothing of a request's body is repeated."""

    def respond(refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body(), refusal.status, headers=headers_of(refusal))

    @api.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> JSONResponse:
        return respond(error)

    @api.exception_handler(RequestValidationError)
    async def tell_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if refusal := _tell_kind(request):
            return respond(refusal)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            if first["ctx"]["error"] == _TWICE:
                return respond(Refusal(422, "invalid", _TWICE))
            return respond(Refusal(422, "no_json", "the body is not JSON"))
        # pydantic names the branches of a union as well
        parts = map(str, first["loc"][1:])
        place = [part for part in parts if not (part in _BRANCHES or part.startswith("function-"))]
        return respond(
            Refusal(
                422, "invalid", first["msg"].removeprefix("Value error, "), ".".join(place) or None
            )
        )

    @api.exception_handler(HTTPException)
    async def tell(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400 and (other := _tell_kind(request)):
            return respond(other)
        codes = {400: "no_json", 404: "no_such_route", 405: "wrong_method"}
        status = 422 if error.status_code == 400 else error.status_code
        words = "the body is not JSON" if status == 422 else str(error.detail)
        refusal = Refusal(status, codes.get(error.status_code, "refused"), words)
        headers = dict(error.headers or {})
        if status == 405:  # of all routes with this path, not of the first alone
            headers["Allow"] = ", ".join(sorted(_methods(api, request)))
        return JSONResponse(refusal.body(), status, headers=headers)


def _methods(api: FastAPI, request: Request) -> set[str]:
    fitting = (r for r in api.routes if r.matches(request.scope)[0] is not Match.NONE)
    return {method for route in fitting for method in getattr(route, "methods", ())}


def _tell_kind(request: Request) -> Refusal | None:
    """Why a body that makes no sense is not read; None: it is said to be plain JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if request.method != "POST" or (kind == "application/json" and packed == "identity"):
        return None
    why = "a body is JSON as it is; send Content-Type: application/json and no Content-Encoding"
    return Refusal(415, "no_json", why)
