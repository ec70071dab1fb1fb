"""The console: how commands speak, and the arguments that several of them take.

It must not know any command.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

console = Console(highlight=False)

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
