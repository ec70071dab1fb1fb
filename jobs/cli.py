"""The command line: `fellray`. Heavy imports wait until a command runs, so `--help` is quick."""

import os
import sys
from typing import Annotated

import typer

from fellray import __version__
from fellray.jobs.data_commands import doctor, init, plan, prepare
from fellray.jobs.run_commands import compare, continue_, evaluate, runs, scale, train
from fellray.jobs.serve_commands import bench_serve, promote, recommend, rollback, serve, token
from fellray.platform.errors import FellrayError

app = typer.Typer(
    name="fellray",
    help="Federated recommendation with language models: split training on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"fellray {__version__}")
        raise typer.Exit


@app.callback()
def _take_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Say which version this is."
        ),
    ] = False,
) -> None:
    """What stands before a command."""


# in the order of the help
for command in (
    init,
    doctor,
    prepare,
    plan,
    train,
    evaluate,
    compare,
    runs,
    recommend,
    serve,
    token,
    promote,
    rollback,
):
    app.command()(command)
app.command("continue")(continue_)
app.command()(scale)

measures = typer.Typer(help="Measure what runs.", no_args_is_help=True)
measures.command("serve")(bench_serve)
app.add_typer(measures, name="bench")


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
