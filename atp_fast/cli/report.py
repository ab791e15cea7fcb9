"""atp-fast report: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atp_fast.cli.folder import REPORT, RUN
from atp_fast.cli.show import print_written


def report(
    run: Annotated[Path, typer.Argument(help="Folder of `atp-fast attribute`, or its file.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html beside the run if not given.")
    ] = None,
) -> None:
    """Write the HTML page of a run: its best nodes and heat maps.

    The page needs no network.
    """
    from atp_fast.results import Attribution

    file = run / RUN if run.is_dir() else run
    page = out or file.with_name(REPORT)
    Attribution.load(file).report(page)
    print_written([page])
