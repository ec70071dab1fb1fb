"""Deploy: a trained run behind Ray Serve, on a Ray of its own or as a job on a cluster."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from pydantic import ValidationError

from fellray.actors.session import ask_for_token, ray
from fellray.jobs.front import (
    OURS,
    SWITCH,
    describe_front,
    find_haproxy,
    refuse_taken,
    wait_until_open,
)
from fellray.jobs.room import await_room
from fellray.platform.errors import FellrayError
from fellray.serve import porter
from fellray.serve.args import Args
from fellray.serve.tokens import new_token, read_tokens, token_storage

NAME = "fellray"
"""Of the application within Serve."""


@dataclass(frozen=True)
class Door:
    """Where it listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls_key: Path | None = None
    tls_certificate: Path | None = None

    def options(self) -> dict[str, Any]:
        """As Serve's `http_options`.

        Raises:
            FellrayError: one half of TLS is missing.
        """
        if (self.tls_key is None) != (self.tls_certificate is None):
            raise FellrayError("--tls-key and --tls-certificate: HTTPS needs both")
        options: dict[str, Any] = {"host": self.host, "port": self.port}
        if self.tls_key and self.tls_certificate:
            options["ssl_keyfile"] = str(self.tls_key.absolute())
            options["ssl_certfile"] = str(self.tls_certificate.absolute())
        return options

    @property
    def address(self) -> str:
        """Its URL."""
        return f"{'https' if self.tls_key else 'http'}://{self.host}:{self.port}"


def read_args(run: str, overrides: Sequence[str] = ()) -> Args:
    """The application's arguments; replicas may have another working directory.

    Raises:
        FellrayError: a key is unknown, or a value does not fit.
    """
    tree: dict[str, Any] = {"run": run if ":/" in run else os.path.abspath(run)}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise FellrayError(f"{override!r}: write key=value, for example round=latest")
        try:
            tree[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise FellrayError(f"{override!r}: the value is not YAML: {error}") from None
    try:
        return Args.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(Args.model_fields)
        field = ".".join(map(str, first["loc"][:1]))
        raise FellrayError(f"{field}: {first['msg']}; settings are {known}") from None


@contextmanager
def serving(args: Args, door: Door) -> Iterator[None]:
    """The application, up and answering, until the block ends.

    A Ray of its own ends with it; what of that Ray listens asks for a token. On a cluster only the
    application is taken down.

    Raises:
        FellrayError: it cannot start.
    """
    options = door.options()
    address = os.environ.get("RAY_ADDRESS", "local")
    with ExitStack() as opened:
        fronted = False
        if address == "local":
            refuse_taken(door.host, door.port)
            fronted = _set_front(door, opened)
        _start_ray(args, address)
        opened.callback(ray.shutdown)
        await_room(args, nodes_may_come=address != "local")
        # Serve reads its environment when it is imported, as Ray does
        from ray import serve

        from fellray.serve.app import build

        serve.start(http_options=options, proxy_location="HeadOnly")
        try:
            try:
                serve.run(build(args), name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise FellrayError(f"the application did not start: {error}") from None
            if fronted:
                wait_until_open(door.host, door.port)
            yield
        finally:
            serve.delete(NAME)
            if address == "local":
                serve.shutdown()


def _set_front(door: Door, opened: ExitStack) -> bool:
    """HAProxy before a Ray of our own, where there is one and nobody said otherwise.

    It speaks no TLS to anybody, so HTTPS stays with Serve's own proxy.
    """
    said = SWITCH in os.environ and OURS not in os.environ
    binary = None if said or door.tls_key else find_haproxy()
    if binary is None:
        return False
    folder = opened.enter_context(TemporaryDirectory(prefix="fellray-"))
    os.environ |= describe_front(Path(folder), binary)
    return True


def _start_ray(args: Args, address: str) -> None:
    if address == "local":
        ask_for_token()
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        os.environ.setdefault(porter.SWITCH, porter.PLACE)
        most = [args.most_recommenders or args.recommenders, args.most_trunks or args.trunks]
        ray.init(
            address=address,
            num_cpus=max(os.cpu_count() or 1, int(args.cpus * sum(most) + 0.999)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    else:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")


def deploy(args: Args, door: Door, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. Where nobody has a token yet, the operator's is made and told.

    Raises:
        FellrayError: as `serving`.
    """
    storage = token_storage(args)
    shown = "$TOKEN"
    if not len(read_tokens(storage)):
        shown = new_token(storage, None)
        tell(f"The operator's token, shown this once: {shown}")
    with suppress(KeyboardInterrupt), serving(args, door):
        # a service manager's way to say Ctrl-C; Ray has put a handler of its own there
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        tell(f"{args.run} is served at {door.address}, a page too; Ctrl-C ends it. For example:")
        tell(
            f"  curl {door.address}/v1/recommend -H 'Authorization: Bearer {shown}' "
            "-H 'Content-Type: application/json' "
            """-d '{"client": "c0", "history": ["Alien (1979)"]}'"""
        )
        threading.Event().wait()


def main() -> None:
    """`python jobs/deploy.py RUN [port=8000] [key=value ...]`, also under `ray job submit`.

    It ends with the job: `ray job stop` takes the application down.
    """
    run, *overrides = sys.argv[1:]
    ports = [int(word[5:]) for word in overrides if re.fullmatch(r"port=\d+", word)]
    others = [word for word in overrides if not re.fullmatch(r"port=\d+", word)]
    deploy(read_args(run, others), Door(port=(*ports, 8000)[0]), print)


if __name__ == "__main__":
    main()
