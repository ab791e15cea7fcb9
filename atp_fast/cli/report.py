"""atp-fast report: the page of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from atp_fast.cli.diagnose import BOUND
from atp_fast.cli.folder import REPORT, RUN
from atp_fast.cli.show import print_written
from atp_fast.cli.verify import EXACT


def report(
    run: Annotated[Path, typer.Argument(help="Folder of `atp-fast attribute`, or its file.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html beside the run if not given.")
    ] = None,
) -> None:
    """Write the HTML page of a run: its prompts, best nodes and heat maps.

    Of a folder in which `atp-fast verify` and `atp-fast diagnose` were run it
    also shows what they found. The page needs no network.
    """
    from atp_fast.results import Attribution, PatchEffects

    file = run / RUN if run.is_dir() else run
    page = out or file.with_name(REPORT)
    found = Attribution.load(file)
    exact = run / EXACT if run.is_dir() else None
    verified = PatchEffects.load(exact) if exact and exact.is_file() else None
    found.report(page, exact=verified, bound=_bound(run) if run.is_dir() else None)
    print_written([page])


def _bound(run: Path) -> dict[str, Any] | None:
    """What `atp-fast diagnose` left in the folder, if it did."""
    path = run / BOUND
    if not path.is_file():
        return None
    try:
        bound: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be what atp-fast diagnose wrote, got {error}") from error
    return bound
