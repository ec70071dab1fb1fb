"""The console: how commands speak, and the arguments that several of them take.

It must not know any command.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fellray.platform.words import HEADLINE, STATISTICS, format_number, name_metric

console = Console(highlight=False)

SHOWN_CLIENTS = 20
_METRICS = ("recall@10", "ndcg@10", "mrr@10", "recall@20", "coverage@10")

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file; `fellray init` writes a first one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Change the config: train.rounds=3 method.kind=fedavg"
    ),
]


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
    table = Table("test", *_METRICS, title=f"{summary['run']} (best round {summary['best_round']})")
    for row in ("popularity", "prior", "untrained", "test"):
        values = summary[row]
        assert isinstance(values, dict)
        name = str(summary["method"]) if row == "test" else row
        table.add_row(name, *(f"{values[m]:.4f}" for m in _METRICS))
    console.print(table)
    if summary["best_round"] == 0:
        tell("No round beat the untrained model on validation: what is tested is round 0.")


def show_scores(scores: Mapping[str, Any]) -> None:
    """What `jobs.evaluate` found: all clients' users together, then clients, the lowest first."""
    clients = scores["per_client"]
    table = Table(scores["split"], *_METRICS, title=f"{scores['run']} (round {scores['round']})")
    lowest = sorted(clients, key=lambda client: (clients[client].get(HEADLINE, -1.0), client))
    listed = [(client, clients[client]) for client in lowest[:SHOWN_CLIENTS]]
    for name, values in [("all users", scores["pooled"]), *listed]:
        table.add_row(name, *(format_number(values.get(m)) for m in _METRICS))
    console.print(table)
    if len(clients) > SHOWN_CLIENTS:
        tell(f"the lowest {SHOWN_CLIENTS} of {len(clients)} clients by {name_metric(HEADLINE)}")
    told = (f"{STATISTICS[name]} {scores['balance'][name]:.4f}" for name in ("mean", "cv", "jain"))
    tell(f"{name_metric(HEADLINE)} over clients: {', '.join(told)}")
    tell("All metrics, all digits: --json")
