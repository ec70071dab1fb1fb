"""The command line: `fellray`. Heavy imports wait until a command runs, so `--help` is quick."""

import json
import os
import sys
from pathlib import Path
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

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file; `fellray init` writes a first one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Change the config: train.rounds=3 method.kind=fedavg"
    ),
]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the config.")] = Path("fellray.yaml"),
    source: Annotated[
        str,
        typer.Option(help="`demo`, a data folder, or a CSV or Parquet file of interactions."),
    ] = "demo",
    items: Annotated[Path | None, typer.Option(help="A file of items with titles.")] = None,
) -> None:
    """Write a first config, with every common setting explained."""
    from fellray.jobs.init import write_config

    write_config(path, source, items)
    console.print(f"{path} written. Next: fellray prepare {path}, then fellray train {path}")


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
    """Read interactions, divide them among clients, and write one shard per client."""
    from fellray.jobs.prepare import prepare as run
    from fellray.platform.config import load

    loaded = load(config, overrides or [])
    manifest = run(loaded)
    counts = manifest["counts"]
    table = Table("client", "users", "train", "valid", "test", title=str(loaded.data.path))
    for name, entry in list(manifest["clients"].items())[:20]:
        table.add_row(name, *(str(entry[k]) for k in ("users", "train", "valid", "test")))
    console.print(table)
    console.print(
        f"{counts['users']} users, {counts['items']} items, {counts['interactions']} interactions, "
        f"{len(manifest['clients'])} clients. Next: fellray train {config}"
    )


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train federated; an interrupted run goes on where it stopped."""
    from fellray.jobs.train import train as run
    from fellray.platform.config import load

    loaded = load(config, overrides or [])
    summary = run(loaded)
    show_summary(summary)
    folder = f"{loaded.storage}/{loaded.name}"
    console.print(f"Report: {folder}/report.html. Next: fellray recommend {folder} --help")


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
            "--client-cost", help="Instead: what a client needs, by k, against the whole."
        ),
    ] = False,
) -> None:
    """Train several methods on the same data and seeds, and set them side by side."""
    from fellray.platform.config import load

    loaded = load(config, overrides or [])
    if client_cost:
        from fellray.jobs.cost import measure_costs, show_costs

        show_costs(measure_costs(loaded))
        return
    from fellray.jobs.compare import compare as run
    from fellray.jobs.compare import show_comparison

    if bad := [seed for seed in seeds.split(",") if not seed.strip().isdecimal()]:
        raise FellrayError(f"--seeds {seeds}: {bad[0]!r} is no seed; write numbers: --seeds 0,1,2")
    show_comparison(run(loaded, methods.split(","), [int(seed) for seed in seeds.split(",")]))


@app.command()
def runs(
    storage: Annotated[str, typer.Argument(help="A folder or URI that holds runs.")] = "runs",
) -> None:
    """List the runs on a storage."""
    from fellray.platform.run import list_runs

    table = Table(
        "run", "method", "seed", "rounds", "best", "test NDCG@10", "worst client", "state"
    )
    for row in list_runs(storage):
        table.add_row(*row)
    console.print(table)


@app.command()
def recommend(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    client: Annotated[str, typer.Option(help="Whose adapters and counts to use.")],
    history: Annotated[str, typer.Option(help='Titles, oldest first: "title; title".')],
    k: Annotated[int, typer.Option(help="How many items.")] = 10,
    round: Annotated[int | None, typer.Option(help="Which round; the best by default.")] = None,
) -> None:
    """Recommend items for a history of titles, with one client's model."""
    from fellray.serve.recommender import Recommender

    titles = [title.strip() for title in history.split(";") if title.strip()]
    table = Table("rank", "item", "title", "score")
    for one in Recommender.open(run, round).recommend(client, titles, k):
        table.add_row(str(one.rank), str(one.item_id), one.title, f"{one.score:.4f}")
    console.print(table)


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
