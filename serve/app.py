"""The application for Ray Serve: `Recommender` and `Trunk` as deployments, the split kept.

    serve run fellray.serve.app:build run=/abs/runs/demo

The plain classes become deployments here and nowhere else. Activations go from a recommender to a
trunk through a handle; whichever trunk is asked, the answer is the same.
"""

import asyncio
import logging
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from fellray.platform.errors import FellrayError
from fellray.platform.messages import Activation
from fellray.platform.run import Run, read_run
from fellray.platform.shards import Dataset
from fellray.serve.api import make_api
from fellray.serve.args import Args
from fellray.serve.recommender import Recommender
from fellray.serve.schema import Answer, Queries
from fellray.serve.served import Watch, refuse_passing, verify
from fellray.serve.tokens import TokenFile, read_tokens, token_storage
from fellray.serve.trunk import Trunk

TRIES = 5
"""Trunks that are asked, one after the other lost, before a request fails."""
PAUSE_S = 0.2
CROSSINGS = 4
"""That a trunk may have in hand on average before another trunk comes. A crossing carries up to
`rows` questions, and a recommender sends the next while the last is under way: of two busy ones."""


class Behind:
    """A trunk behind a handle."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def forward(self, activation: Activation) -> np.ndarray:
        """See `Trunk.forward`; asking twice does no harm, so a lost replica's work is asked again.

        Raises:
            FellrayError: as `Trunk.forward`, or no trunk can be reached.
        """
        for tries in range(TRIES):
            try:
                output: np.ndarray = await self._handle.forward.remote(activation)
                return output
            except RayActorError as error:
                lost = error
                await asyncio.sleep(PAUSE_S * tries)
        raise FellrayError(f"no trunk can be reached: {lost}")

    async def ready(self) -> bool:
        """See `Trunk.ready`."""
        return bool(await self._handle.ready.remote())


class _Recommender(Recommender):
    """With its API, its tokens and its watch on the run's folder."""

    def __init__(self, args: dict[str, Any], trunk: DeploymentHandle):
        self._asked = asked = Args(**args)
        super().__init__(asked, Behind(trunk))
        self._tokens = TokenFile(token_storage(asked), asked.poll_s)
        self._tokens.start()
        self.watch()
        _show(logging.getLogger("fellray"))

    def __serve_build_asgi_app__(self) -> Any:
        """What Serve asks for over HTTP."""
        replica = serve.get_replica_context().replica_id.unique_id
        return make_api(self, self._asked, lambda: self._tokens.tokens, {"replica": replica})

    async def ask(self, queries: dict[str, Any]) -> list[Answer]:
        """For other deployments, through a handle: the body of `/v1/recommend/batch`, no token."""
        return await self.recommend(Queries.model_validate(queries).queries)


def build(args: Args) -> serve.Application:
    """The application of one run.

    Raises:
        FellrayError: there is no such run, its round is not committed or damaged, its data are not
            there, or nobody has a token.
    """
    run = read_run(args.run)
    refuse_passing(args, run)
    data = Dataset(run.config.data.path)
    learners = tuple(sorted(run.config.method.seat(data.clients)))
    verify(run, Watch(args, learners, data.sha256).served.round, learners)
    _refuse_without_tokens(args, run)
    plain = args.model_dump()
    options: dict[str, Any] = {
        "max_ongoing_requests": args.waiting,
        "health_check_period_s": 2,
        "logging_config": {"enable_access_log": False},  # the gate writes one
    }
    trunk = serve.deployment(
        Trunk,
        name="Trunk",
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.trunk_gpus},
        **_replicas(args.trunks, args.most_trunks, CROSSINGS),
        **options,
    ).bind(args, learners)
    return serve.deployment(
        serve.ingress()(_Recommender),
        name="Recommender",
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.recommender_gpus},
        **_replicas(args.recommenders, args.most_recommenders, _requests(args)),
        **options,
    ).bind(plain, trunk)


def _refuse_without_tokens(args: Args, run: Run) -> None:
    if not len(read_tokens(token_storage(args))):
        raise FellrayError(
            f"{token_storage(args)}: holds no tokens.json, so nobody could ask; make a token with "
            f"`fellray token {args.run} CLIENT` or `fellray token {args.run} --operator`"
        )


def _requests(args: Args) -> float:
    """That a recommender may have in hand on average before another one comes: half a batch. Ray's
    own two would bring all replicas for a few requests, and divide among them what is computed
    together."""
    return max(1, min(args.rows, args.waiting) / 2)


def _replicas(least: int, most: int | None, in_hand: float) -> dict[str, Any]:
    if most is None or most == least:
        return {"num_replicas": least}
    bounds = {"min_replicas": least, "max_replicas": most}
    return {"autoscaling_config": bounds | {"target_ongoing_requests": in_hand}}


def _show(log: logging.Logger) -> None:
    """Where Serve's own lines go, the replica's file; the root logger would drop them."""
    log.setLevel(logging.INFO)
    log.handlers = logging.getLogger("ray.serve").handlers
    log.propagate = False
