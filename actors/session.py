"""Ray's beginning and end in this process. Whoever needs Ray here imports it from this file.

Ray reads some of its environment when it is imported, so what makes it safe is set before: a Ray
that we start asks every caller for a token, and nothing is reported anywhere.
"""

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError

# a thread that spins while it waits takes its core from the other actors of the machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_FIRST = "ray" not in sys.modules
if _FIRST and not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray  # noqa: E402 - after the environment it reads
from ray.util import metrics  # noqa: E402

__all__ = ["ask_for_token", "connect", "find_address", "metrics", "ray"]


TRIES = 3
"""To start a Ray of one's own."""
_OPEN_PORTS = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
"""Where Ray 2.60's own metrics listen on all addresses, ask for no token, cannot be turned off: on
a port that is none they do not start, and nothing else is the worse for it."""


def ask_for_token() -> None:
    """The Rays that this process starts from now on ask for a token, which it has."""
    for name in _OPEN_PORTS:
        os.environ.setdefault(name, "65536")
    if _FIRST and os.environ.get("RAY_AUTH_MODE") == "token":
        # once per process: Ray remembers the first token it has seen
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def find_address(config: RunConfig) -> str:
    """Which Ray a run is for; `local`: one of its own."""
    # `ray job submit` names its cluster in the environment; an empty address would join any.
    return os.environ.get("RAY_ADDRESS") or config.cluster.address


@contextmanager
def connect(config: RunConfig, actors: int) -> Iterator[None]:
    """Ray for one run: the job's, the one named in `cluster.address`, or one of its own.

    A Ray of its own ends with the run. It has as many logical CPUs as `actors` client actors and
    servers ask for, because on one machine the actors share its cores anyway.
    """
    if ray.is_initialized():
        yield
        return
    address = find_address(config)
    if address == "local":
        ask_for_token()
        # its endpoint would be open to everybody: for Prometheus set it to 1
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        needed = config.server.count * config.server.cpus + actors * config.clients.cpus
        _start(max(os.cpu_count() or 1, int(needed + 0.999)))
    else:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _start(cpus: int) -> None:
    """A Ray of one's own. Ray itself gives it half a minute, which a busy machine may need more of.

    Raises:
        FellrayError: it did not start in `TRIES` tries.
    """
    here = psutil.Process()
    for left in reversed(range(TRIES)):
        before = set(here.children(recursive=True))
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray has no narrower one for this
            if "timed out during startup" not in str(error):
                raise
        # nobody else ends what it had started
        for process in set(here.children(recursive=True)) - before:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if not left:
            raise FellrayError(
                f"Ray did not start in {TRIES} tries of half a minute: the machine is busy with "
                "something else, or short of memory; run the same command when it is not"
            )
