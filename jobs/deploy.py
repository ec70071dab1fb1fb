"""Deploy: a trained run behind Ray Serve, on a Ray of its own or as a job on a cluster."""

import json
import os
import shlex
import signal
import ssl
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
from fellray.platform.run import read_run
from fellray.platform.shards import Dataset
from fellray.serve import porter
from fellray.serve.args import Args
from fellray.serve.served import Watch, refuse_passing
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
            FellrayError: one half of TLS is missing, they are no pair or cannot be read, or the
                environment asks for a front that speaks no TLS.
        """
        if (self.tls_key is None) != (self.tls_certificate is None):
            raise FellrayError("--tls-key and --tls-certificate: HTTPS needs both")
        options: dict[str, Any] = {"host": self.host, "port": self.port}
        if self.tls_key and self.tls_certificate:
            _check_pair(self.tls_key, self.tls_certificate)
            if os.environ.get(SWITCH) == "1" and OURS not in os.environ:
                raise FellrayError(
                    f"{SWITCH}=1: Ray's HAProxy speaks no TLS; unset it, or leave out --tls-key "
                    "and --tls-certificate and put a proxy of your own in front"
                )
            options["ssl_keyfile"] = str(self.tls_key.absolute())
            options["ssl_certfile"] = str(self.tls_certificate.absolute())
        return options

    @property
    def address(self) -> str:
        """Its URL."""
        return f"{'https' if self.tls_key else 'http'}://{self.host}:{self.port}"


def _check_pair(key: Path, certificate: Path) -> None:
    for file in (key, certificate):
        if not os.access(file, os.R_OK) or file.is_dir():
            raise FellrayError(f"{file}: cannot be read; --tls-key and --tls-certificate are files")
    try:
        # nobody is there to type a password where it is served
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
    except (OSError, ValueError) as error:
        raise FellrayError(
            f"{certificate}, {key}: are no certificate and its key ({error}); both are PEM, the "
            "key without a password"
        ) from None


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
        if address == "local":
            refuse_taken(door.host, door.port)
            _set_front(door, opened)
        _start_ray(args, address)
        opened.callback(ray.shutdown)
        await_room(args, nodes_may_come=address != "local")
        # Serve reads its environment when it is imported, as Ray does
        from ray import serve

        from fellray.serve.app import build

        try:
            serve.start(http_options=options, proxy_location="HeadOnly")
        except (RuntimeError, ray.exceptions.RayError) as error:
            said = str(error).strip().rpartition("\n")[2]
            raise FellrayError(f"Ray Serve did not start, so try again: {said}") from None
        try:
            try:
                serve.run(build(args), name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise FellrayError(f"the application did not start: {error}") from None
            if address == "local" or _is_head(ray):
                wait_until_open(door.host, door.port, tls=door.tls_key is not None)
            yield
        finally:
            serve.delete(NAME)
            if address == "local":
                serve.shutdown()


def _set_front(door: Door, opened: ExitStack) -> None:
    """HAProxy before a Ray of our own, where there is one and nobody said otherwise.

    It speaks no TLS to anybody, so HTTPS stays with Serve's own proxy.
    """
    said = SWITCH in os.environ and OURS not in os.environ
    binary = None if said or door.tls_key else find_haproxy()
    if binary is not None:
        folder = opened.enter_context(TemporaryDirectory(prefix="fellray-"))
        os.environ |= describe_front(Path(folder), binary)


def _is_head(ray: Any) -> bool:
    """Whether the port would be this machine's: Serve listens on the head node."""
    own = ray.get_runtime_context().get_node_id()
    heads = (node for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    return any(node["NodeID"] == own for node in heads)


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
        FellrayError: as `serving`; or there is nothing to be served, and then no token is made.
    """
    door.options()
    example = _make_example(args)
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
            f'  curl {door.address}/v1/recommend -H "Authorization: Bearer {shown}" '
            f"-H 'Content-Type: application/json' -d {shlex.quote(example)}"
        )
        threading.Event().wait()


def _make_example(args: Args) -> str:
    """A body that this run answers.

    Raises:
        FellrayError: there is no such run, its data are not there, or no round of it can be served.
    """
    run = read_run(args.run)
    refuse_passing(args, run)
    data = Dataset(run.config.data.path)
    Watch(args, run.config.method.seat(data.clients), data.sha256)
    body = {"client": data.clients[0], "history": data.titles[:1]}
    return json.dumps(body, ensure_ascii=False)


def main() -> None:
    """`python jobs/deploy.py RUN ...`: as `fellray serve`, also under `ray job submit`.

    It ends with the job: `ray job stop` takes the application down.
    """
    from fellray.jobs.cli import main as run_command

    sys.argv.insert(1, "serve")
    run_command()


if __name__ == "__main__":
    main()
