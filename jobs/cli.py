"""The command line: `fellray`. Heavy imports wait until a command runs, so `--help` is quick."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fellray.platform.errors import FellrayError

app = typer.Typer(
    name="fellray",
    help="Federated recommendation with language models: split training on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(highlight=False)
SHOWN_CLIENTS = 20

measures = typer.Typer(help="Measure what runs.", no_args_is_help=True)
app.add_typer(measures, name="bench")

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file; `fellray init` writes a first one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Change the config: train.rounds=3 method.kind=fedavg"
    ),
]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the config.")] = Path("fellray.yaml"),
    source: Annotated[
        str,
        typer.Option(
            help="`demo`, a data folder (MovieLens, RecBole, Amazon reviews, fellray's own), or a "
            "file: CSV, Parquet, .inter, .json.gz."
        ),
    ] = "demo",
    items: Annotated[Path | None, typer.Option(help="A file of items with titles.")] = None,
) -> None:
    """Write a first config, with every common setting explained."""
    from fellray.jobs.init import UNKNOWN, write_config

    columns = write_config(path, source, items)
    tell(f"{path} written.")
    for ours, theirs in columns.items():
        tell(f"  {ours:<11}{theirs}")
    if missing := [ours for ours, theirs in columns.items() if theirs == UNKNOWN]:
        tell(f"No column looks like {' or '.join(missing)}:")
        tell(f'write its name for each "{UNKNOWN}" in {path}, under data.columns.')
    if columns and "timestamp" not in columns:
        tell("No column looks like a timestamp: the order of the file's rows will count.")
    tell(f"Next: {command('prepare', path, None)}")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; without, the defaults.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine and its environment for what would go wrong; status 1 if broken."""
    from fellray.jobs.doctor import examine, show_findings
    from fellray.platform.config import load

    findings = examine(load(config, overrides or []))
    show_findings(findings)
    if any(one.status == "broken" for one in findings):
        raise typer.Exit(1)


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = None) -> None:
    """Read interactions, divide them among clients, and write one shard per client.

    `data.source` is `demo`, a MovieLens folder (ml-100k, ml-1m, ml-32m), RecBole's atomic files,
    Amazon reviews (2018, 2023), fellray's own folder, or a CSV or Parquet file. `data.partition`
    says who is a client: kmeans, per_user, by_attribute or dirichlet.
    """
    from fellray.jobs.prepare import prepare as run
    from fellray.platform.config import load

    loaded = load(config, overrides or [])
    with interruptible("nothing was written"):
        manifest = run(loaded)
    if loaded.attributes is not None:
        from fellray.jobs.attributes import show_prepared

        show_prepared(loaded, manifest)
        tell(f"Next: {command('train', config, overrides)}")
        return
    counts = manifest["counts"]
    table = Table("client", "users", "train", "valid", "test", title=str(loaded.data.path))
    for name, entry in list(manifest["clients"].items())[:SHOWN_CLIENTS]:
        table.add_row(name, *(str(entry[k]) for k in ("users", "train", "valid", "test")))
    console.print(table)
    if len(manifest["clients"]) > SHOWN_CLIENTS:
        tell(f"the first {SHOWN_CLIENTS} of {len(manifest['clients'])} clients")
    tell(
        f"{counts['users']} users, {counts['items']} items, {counts['interactions']} interactions, "
        f"{len(manifest['clients'])} clients"
    )
    if left_out := manifest.get("left_out"):
        told = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in left_out.items())
        tell(f"left out, since the model reads titles: {told}")
    if loaded.data.k_core > 1:
        tell(f"left: users and items with {loaded.data.k_core} interactions or more (data.k_core)")
    tell(f"Next: {command('train', config, overrides)}")


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Measure a few steps; say how many clients fit where, and what a round will take."""
    from fellray.jobs.plan import plan as run
    from fellray.jobs.plan import show_plan
    from fellray.platform.config import load

    loaded = load(config, overrides or [])
    with interruptible("nothing was written"):
        layout, work = run(loaded)
    show_plan(loaded, layout, work)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train federated; an interrupted run goes on where it stopped."""
    from fellray.jobs.finish import exit_status
    from fellray.jobs.train import train as run
    from fellray.platform.config import load

    loaded = load(config, overrides or [])
    with interruptible("the same command goes on after the last round that was printed"):
        summary = run(loaded)
    if loaded.attributes is not None:
        from fellray.jobs.attribute_summary import show_attributes

        show_attributes(summary)
    else:
        show_summary(summary)
    if summary["privacy"]["mechanism"] != "none":
        tell(f"Privacy: {summary['privacy']['statement']}")
    folder = f"{loaded.storage}/{loaded.name}"
    tell(f"Report: {folder}/report.html")
    if summary.get("model", {}).get("generative"):  # recommend and serve refuse it
        tell(f"Next: fellray evaluate {quote(folder)}")
    elif loaded.attributes is None:
        client = next(iter(summary["per_client"]))
        ask = f'--client {client} --history "a title; another"'
        tell(f"Next: fellray recommend {quote(folder)} {ask}")
    if status := exit_status(summary):
        raise typer.Exit(status)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    round: Annotated[int | None, typer.Option(help="Which round; the best by default.")] = None,
    split: Annotated[str, typer.Option(help="`test` or `valid`.")] = "test",
) -> None:
    """Evaluate a trained run again: full ranking, per client and pooled."""
    from fellray.jobs.evaluate import evaluate as evaluate_run

    scores = evaluate_run(run, round, split)
    console.print_json(json.dumps(scores))


@app.command()
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated method kinds.")
    ] = "fellrec,fedavg,local",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0",
    client_cost: Annotated[
        bool,
        typer.Option(
            "--client-cost", help="Instead: memory and time of one client, by the depth of its cut."
        ),
    ] = False,
) -> None:
    """Train several methods on the same data and seeds, and set them side by side.

    Where CONFIG is a study (jobs/study.yaml), that says everything itself: arms,
    what each may tune, sets, seeds, and the page that is written.
    """
    from fellray.platform.config import load
    from fellray.platform.study import is_study, load_study

    if is_study(config):
        from fellray.jobs.study import run_study

        if overrides:
            raise FellrayError(f"{config} is a study: change it in the file, not by {overrides[0]}")
        with interruptible("the same command goes on with the runs that are not finished"):
            tell(f"Written: {run_study(load_study(config))}")
        return
    loaded = load(config, overrides or [])
    if client_cost:
        from fellray.jobs.cost import measure_costs, show_costs

        show_costs(measure_costs(loaded))
        return
    from fellray.jobs.compare import compare as run
    from fellray.jobs.compare import show_comparison

    if bad := [seed for seed in seeds.split(",") if not seed.strip().isdecimal()]:
        raise FellrayError(f"--seeds {seeds}: {bad[0]!r} is no seed; write numbers: --seeds 0,1,2")
    with interruptible("the same command goes on after the last round that was printed"):
        table = run(loaded, methods.split(","), [int(seed) for seed in seeds.split(",")])
    show_comparison(table)


@app.command()
def runs(
    storage: Annotated[str, typer.Argument(help="A folder or URI that holds runs.")] = "runs",
) -> None:
    """List the runs on a storage."""
    from fellray.platform.run import list_runs

    found = list_runs(storage)
    if not found:
        tell(f"{storage} holds no runs: `fellray train` makes them, in the config's `storage`")
        return
    table = Table()
    table.add_column("run", overflow="fold")
    for column in ("method", "seed", "rounds", "best", "test NDCG@10", "worst client", "state"):
        table.add_column(column.replace(" ", "\n"), no_wrap=True)
    for row in found:
        table.add_row(*row)
    console.print(table)
    if any(row[-1] == "interrupted" for row in found):
        tell("An interrupted run goes on with the command that began it.")
    if any(row[-1] == "damaged" for row in found):
        tell("A damaged run's config.json, summary.json or newest round cannot be read.")


@app.command()
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


@app.command()
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


@measures.command("serve")
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


@app.command()
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
    print(new_token(place, client))


@app.command()
def promote(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    round: Annotated[int, typer.Argument(help="A committed round.")],
) -> None:
    """Serve this round from now on; `fellray rollback` takes it back."""
    from fellray.platform.promotion import promote as name_round
    from fellray.platform.run import read_run

    opened = read_run(run)
    name_round(opened.storage, round, opened.rounds.committed())
    tell(f"{run}: round {round} is to be served")


@app.command()
def rollback(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
) -> None:
    """Take the last `fellray promote` back."""
    from fellray.platform.promotion import roll_back
    from fellray.platform.run import read_run

    served = roll_back(read_run(run).storage).served
    what = "what the application was started with" if served is None else f"round {served}"
    tell(f"{run}: {what} is to be served")


@app.command("continue")
def continue_(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run's folder or URI.")],
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds to train; 1 if not said.", show_default=False)
    ] = None,
    events: Annotated[
        str | None,
        typer.Option(help="The folder of the events, if the service has events=FOLDER."),
    ] = None,
) -> None:
    """Train on with the events that came over POST /v1/events since.

    It begins with the served round and makes a new run beside RUN: demo-1
    beside demo, demo-2 after it. Each event becomes a training interaction
    of its client, once: what demo-1 has taken demo-2 will not take again.
    What is held out for validation and test stays the same, with the same
    histories before it, so that scores can be compared. RUN itself stays as
    it is and can be served meanwhile; then serve the new one.

    An interrupted one goes on with the same command.
    """
    from fellray.jobs.continuation import continue_run
    from fellray.platform.run import read_run

    with interruptible("the same command goes on after the last round that was printed"):
        summary = continue_run(run, rounds, events, tell)
    show_summary(summary)
    old = read_run(run).storage
    new = old.beside(str(summary["run"]))
    tell(f"Report: {new}/report.html")
    tokens = f" tokens={quote(str(old))}" if old.exists("tokens.json") else ""
    tell(f"Next: fellray serve {quote(str(new))}{tokens}")


@app.command()
def scale(
    folder: Annotated[
        Path, typer.Argument(help="Where data, runs and the report go; all nodes must reach it.")
    ],
    overrides: Overrides = None,
    registered: Annotated[str, typer.Option(help="Clients there are.")] = "10,100,1000",
    sampled: Annotated[str, typer.Option(help="Clients that train in a round.")] = "10",
    actors: Annotated[str, typer.Option(help="Actors that hold them.")] = "3",
    nodes: Annotated[str, typer.Option(help="Nodes that hold the actors.")] = "3",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of every layout.")] = 5,
    node_cpus: Annotated[int, typer.Option(min=1, help="CPUs of one client node.")] = 1,
    dry: Annotated[int, typer.Option(min=0, help="Clients to draw from only; 0: none.")] = 100_000,
    prices: Annotated[Path | None, typer.Option(help="A price table of your own.")] = None,
    lose_node: Annotated[
        bool, typer.Option(help="End a pretended node in the middle of the first training.")
    ] = True,
) -> None:
    """Try how training scales: nodes come, train and go, for every combination of the lists.

    On this machine nodes are pretended; with cluster.address, or in a Ray job, they are real.
    """
    from fellray.jobs.layouts import read_layouts
    from fellray.jobs.scale import scale as run
    from fellray.jobs.scale import show_scaling
    from fellray.platform.prices import EXAMPLE, load_prices

    layouts = read_layouts(registered=registered, sampled=sampled, actors=actors, nodes=nodes)
    table = load_prices(prices or EXAMPLE)
    with interruptible("nothing was reported"):
        report = run(folder, layouts, rounds, node_cpus, dry, table, lose_node, overrides or [])
    show_scaling(report)
    tell(f"Report: {folder}/scale.html")


@contextmanager
def interruptible(then: str) -> Iterator[None]:
    """Ctrl-C ends the command with status 130 and a word on what comes of it."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"fellray: interrupted; {then}", file=sys.stderr)
        raise typer.Exit(130) from None


def command(name: str, config: Path, overrides: list[str] | None) -> str:
    """A command on the same config, to be copied into a shell."""
    return " ".join(["fellray", name, *map(quote, [str(config), *(overrides or [])])])


def tell(line: str) -> None:
    """A line as it is: not wrapped, so that a command in it can be copied, and no markup in it."""
    console.print(line, markup=False, soft_wrap=True)


def show_summary(summary: dict[str, object]) -> None:
    """The test table of one run: the model beside the rows that need none."""
    metrics = ("recall@10", "ndcg@10", "mrr@10", "recall@20", "coverage@10")
    table = Table("test", *metrics, title=f"{summary['run']} (best round {summary['best_round']})")
    for row in ("popularity", "prior", "untrained", "test"):
        values = summary[row]
        assert isinstance(values, dict)
        name = str(summary["method"]) if row == "test" else row
        table.add_row(name, *(f"{values[m]:.4f}" for m in metrics))
    console.print(table)
    if summary["best_round"] == 0:
        tell("No round beat the untrained model on validation: what is tested is round 0.")


def main() -> None:
    """Entry of the `fellray` command: errors a user can mend come without a traceback."""
    # before torch is loaded: threads that wait for each other on a busy machine must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except FellrayError as error:
        print(f"fellray: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
