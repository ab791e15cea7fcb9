"""In: a command line. Out: what its verb prints and writes; one module per verb, each registered here.

May import: everything.
"""

from __future__ import annotations

from typing import Annotated

import typer

from atp_fast._version import __version__
from atp_fast.cli.attribute import attribute
from atp_fast.cli.bench import bench
from atp_fast.cli.commands import Commands
from atp_fast.cli.demo import demo
from atp_fast.cli.diagnose import diagnose
from atp_fast.cli.doctor import doctor
from atp_fast.cli.mib import mib
from atp_fast.cli.report import report
from atp_fast.cli.study import study
from atp_fast.cli.verify import verify

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(attribute)
app.command()(verify)
app.command()(diagnose)
app.command()(study)
app.command()(report)
app.command()(mib)
app.command()(bench)
app.command()(demo)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, not only its message.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Which attention heads and MLP neurons cause a model's behaviour: AtP*.

    Start with `atp-fast demo`, then `atp-fast attribute --help`.
    """
