"""Ray's beginning and end in this process."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from fellray.platform.config import RunConfig

# Read by Ray when it is imported: a local Ray asks for a token, and nothing is reported anywhere.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray


@contextmanager
def connect(config: RunConfig, actors: int) -> Iterator[None]:
    """Ray for one run: the job's, the one named in `cluster.address`, or one of its own.

    A Ray of its own ends with the run. It has as many logical CPUs as `actors` client actors and
    the server ask for, because on one machine the actors share its cores anyway.
    """
    if ray.is_initialized():
        yield
        return
    # `ray job submit` names its cluster in the environment; an empty address would join any.
    address = os.environ.get("RAY_ADDRESS") or config.cluster.address
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        needed = config.server.cpus + actors * config.clients.cpus
        cpus = max(os.cpu_count() or 1, int(needed + 0.999))
        ray.init(address=address, num_cpus=cpus, include_dashboard=False, **quiet)
    else:
        ray.init(address=address, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
