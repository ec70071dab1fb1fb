"""Commands that train and compare runs, and say what came of them.

Heavy imports wait until a command runs, so `--help` is quick.
"""

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.table import Table

from fellray.jobs.console import (
    ConfigFile,
    Overrides,
    console,
    interruptible,
    show_scores,
    show_summary,
    tell,
)
from fellray.platform.errors import FellrayError


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
    unserved = summary.get("model", {}).get("generative") or loaded.method.moves_base()
    if unserved:  # recommend and serve refuse it
        tell(f"Next: fellray evaluate {quote(folder)}")
    elif loaded.attributes is None:
        client = next(iter(summary["per_client"]))
        ask = f'--client {client} --history "a title; another"'
        tell(f"Next: fellray recommend {quote(folder)} {ask}")
    if status := exit_status(summary):
        raise typer.Exit(status)


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    round: Annotated[int | None, typer.Option(help="Which round; the best by default.")] = None,
    split: Annotated[str, typer.Option(help="`test` or `valid`.")] = "test",
    as_json: Annotated[
        bool, typer.Option("--json", help="All metrics of all clients, all digits, as JSON.")
    ] = False,
) -> None:
    """Evaluate a trained run again: full ranking, per client and pooled."""
    from fellray.jobs.evaluate import evaluate as evaluate_run

    scores = evaluate_run(run, round, split)
    if as_json:
        console.print_json(json.dumps(scores))
    else:
        show_scores(scores)


def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated method kinds.")
    ] = "fellrec,fedavg,local",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0",
    orientation: Annotated[
        bool,
        typer.Option(
            "--orientation",
            help="Also item-kNN, BPR-MF and SASRec, trained on everybody's data in one place.",
        ),
    ] = False,
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
    Started several times, the processes share a study's runs.
    """
    from fellray.platform.config import load
    from fellray.platform.study import is_study, load_study

    if is_study(config):
        from fellray.jobs.study import run_study

        if overrides:
            raise FellrayError(f"{config} is a study: change it in the file, not by {overrides[0]}")
        if orientation:
            raise FellrayError(f"{config} is a study: write `orientation: true` into it")
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
        wanted = [int(seed) for seed in seeds.split(",")]
        table = run(loaded, methods.split(","), wanted, orientation)
    show_comparison(table)


def runs(
    storage: Annotated[str, typer.Argument(help="A folder or URI that holds runs.")] = "runs",
) -> None:
    """List the runs on a storage."""
    from fellray.platform.run_list import list_runs

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
