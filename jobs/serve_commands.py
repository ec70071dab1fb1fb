"""Commands on a run that is trained: asking it, serving it, and who may ask what is served.

Heavy imports wait until a command runs, so `--help` is quick.
"""

import difflib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fellray.jobs.console import (
    console,
    tell,
)
from fellray.platform.errors import FellrayError


def recommend(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    client: Annotated[str, typer.Option(help="Whose adapters and counts to use.")],
    history: Annotated[str, typer.Option(help='Titles, oldest first: "title; title".')],
    k: Annotated[int, typer.Option(help="How many items.")] = 10,
    round: Annotated[int | None, typer.Option(help="Which round; the best by default.")] = None,
) -> None:
    """Recommend items for a history of titles, with one client's model."""
    from fellray.jobs.recommend import recommend as ask

    if not history.strip(" ;"):
        raise FellrayError('--history is empty; write titles, oldest first: "title; title"')
    answer, unknown = ask(run, client, history, k, round)
    for title in unknown:
        tell(f"not in the catalogue, so the model has only its words: {title}")
    table = Table("rank", "item", "title", "score")
    for one in answer.items:
        item = one.source_id or str(one.item_id)
        table.add_row(str(one.rank), item, one.title, f"{one.score:.4f}")
    console.print(table)


def serve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Change a setting: round=latest recommenders=2"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    tls_key: Annotated[Path | None, typer.Option(help="A private key, for HTTPS.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="Its certificate.")] = None,
) -> None:
    """Serve a run over HTTP, on this machine unless told otherwise, until Ctrl-C."""
    from fellray.jobs.deploy import Door, deploy, read_args

    args = read_args(run, overrides or [])
    deploy(args, Door(host, port, tls_key, tls_certificate), tell)


def bench_serve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of the service: threads=2 trunks=2"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.2, help="Of every load in a turn.")] = 4.0,
    turns: Annotated[int, typer.Option(min=1, help="Times every arm is measured.")] = 5,
    connections: Annotated[int, typer.Option(min=1, max=1024, help="In a closed loop.")] = 64,
    users: Annotated[int, typer.Option(min=1, help="Who asks, in turn over all clients.")] = 1000,
    zipf: Annotated[
        float, typer.Option(min=0, help="How unequally often users ask; 0: all alike.")
    ] = 0.0,
    adapters: Annotated[
        str, typer.Option(help="Numbers of clients for 32 places; empty: left out.")
    ] = "64,512,4096",
    rate: Annotated[
        float | None, typer.Option(min=0.1, help="One open loop of so many requests a second.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="http://HOST:PORT of a service that runs; its token in FELLRAY_TOKEN."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and of who asks.")] = 0,
    out: Annotated[
        Path, typer.Option(help="A folder for bench-serve.json and bench-serve.html.")
    ] = Path("runs"),
) -> None:
    """Put a served run under load over HTTP, and say what it stands up to.

    [bold]Closed loop[/]: so many connections, each with a request on its way; that is saturation.
    [bold]Open loop[/]: requests come when they come, a Poisson process at 30, 50, 70 and 85 % of
    that, and a request's time counts from when it was due.

    Without [bold]--at[/] the run is served for it, and arms take turns on the same two cores: the
    service; the bare forward loop over the same users in one process; the service with rows=1, so
    that nobody shares a batch; its /healthz; and Ray Serve as it comes with a route that does
    nothing. Then 64, 512 and 4,096 clients by Zipf's law with room for 32 adapters. About 6 minutes
    with MiniLM; `--turns 1 --seconds 1 --adapters ""` for a first look.
    """
    from fellray.jobs.bench_job import bench_serve as measure

    measure(
        run,
        out,
        at,
        seconds=seconds,
        turns=turns,
        connections=connections,
        users=users,
        zipf=zipf,
        adapters=adapters,
        rate=rate,
        seed=seed,
        settings=tuple(overrides or ()),
    )


def token(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    client: Annotated[str | None, typer.Argument(help="Whose token it is.")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="One for all clients.")] = False,
    tokens: Annotated[
        str | None, typer.Option(help="Where tokens.json lies, if not with the run.")
    ] = None,
) -> None:
    """Make a token for the served run; it is shown once, only its hash is kept."""
    from fellray.platform.run import read_run
    from fellray.platform.storage import Storage
    from fellray.serve.tokens import new_token

    if operator == (client is not None):
        raise FellrayError("name one client, or give --operator for a token that opens all")
    place = Storage(tokens) if tokens else read_run(run).storage
    if client is not None:
        _check_client(run, client)
    print(new_token(place, client))


def _check_client(run: str, client: str) -> None:
    """Raises:
    FellrayError: it is none of the run's. Where the data are out of reach it is said only.
    """
    from fellray.platform.run import read_run
    from fellray.platform.shards import Dataset

    try:
        clients = Dataset(read_run(run).config.data.path).clients
    except FellrayError as error:
        print(f"fellray: not checked that there is a client {client!r}: {error}", file=sys.stderr)
        return
    if client not in clients:
        near = difflib.get_close_matches(client, clients, cutoff=0.0)
        named = ", ".join(map(repr, near))
        raise FellrayError(f"{run}: has no client {client!r}; the nearest names are {named}")


def promote(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    round: Annotated[int, typer.Argument(help="A committed round.")],
) -> None:
    """Serve this round from now on; `fellray rollback` takes it back."""
    from fellray.platform.promotion import promote as name_round
    from fellray.platform.run import read_run

    opened = read_run(run)
    name_round(opened.storage, round, opened.rounds.committed)
    tell(f"{run}: round {round} is to be served")


def rollback(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
) -> None:
    """Take the last `fellray promote` back."""
    from fellray.platform.promotion import roll_back
    from fellray.platform.run import read_run

    served = roll_back(read_run(run).storage).served
    what = "what the application was started with" if served is None else f"round {served}"
    tell(f"{run}: {what} is to be served")
