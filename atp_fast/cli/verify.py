"""atp-fast verify: exact effects of a run's best nodes, beside its estimates."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from atp_fast.cli import options
from atp_fast.cli.opened import open_run
from atp_fast.cli.show import console, print_written
from atp_fast.files import write_csv, write_text, written_whole

if TYPE_CHECKING:
    from atp_fast.results.agreement import Agreement, Verified

EXACT = "verified.safetensors"
TABLE = "verified.csv"
NUMBERS = "verified.json"
SCATTER = "verified.html"
COLUMNS = ("kind", "layer", "position", "token", "index")


def verify(
    run: options.Run,
    top: Annotated[int, typer.Option(min=1, help="Best nodes to patch exactly.")] = 100,
    nodes: options.RunNodes = None,
    worst: Annotated[int, typer.Option(min=0, help="Worst disagreements to print.")] = 10,
    model: options.MovedModel = None,
    backend: options.Backend = "auto",
) -> None:
    """Patch a run's best nodes exactly, and compare with their estimates.

    Each node costs one forward pass per pair. What was not verified is
    not judged: `atp-fast diagnose` bounds what may have been missed.
    """
    from atp_fast.results.agreement import agreement

    opened = open_run(run, model, backend)
    kinds = None if nodes is None else options.names(nodes)
    chosen = opened.found.top(min(top, opened.found.count(kinds)), kinds)
    exact = opened.engine.patch(
        opened.pairs, chosen, metric=opened.found.metric, direction=opened.direction
    )
    found = agreement(chosen, exact, opened.found.method)
    _print(found, worst)
    exact.save(run / EXACT)
    _write_table(run / TABLE, found)
    write_text(run / NUMBERS, json.dumps(found.to_dict(), indent=2) + "\n")
    written = [run / EXACT, run / TABLE, run / NUMBERS]
    if importlib.util.find_spec("plotly"):
        from atp_fast.results.figures import OPTIONS

        with written_whole(run / SCATTER) as path:
            found.scatter().write_html(path, include_plotlyjs=True, config=OPTIONS)
        written.append(run / SCATTER)
    print_written(written)


def _print(found: Agreement, worst: int) -> None:
    out = console()
    out.print(
        f"{len(found.rows)} nodes patched exactly: rank correlation of {found.method} with the exact contributions "
        f"{found.rank_correlation:.3f}, same sign {100 * found.same_sign:.1f} % (weighted by contribution)",
        markup=False,
    )
    precisions = ", ".join(f"{k}: {p:.2f}" for k, p in found.precisions().items())
    if precisions:
        out.print(f"precision among them at K = {precisions}", markup=False)
    rows = found.worst(worst)
    if not rows:
        return
    table = Table(title=f"{len(rows)} worst disagreements")
    for name in (*COLUMNS, "estimated", "exact", "exact effect"):
        table.add_column(name, justify="left" if name in ("kind", "token") else "right")
    for row in rows:
        cells = [escape("" if cell is None else str(cell)) for cell in _place(row)]
        table.add_row(
            *cells,
            f"{row.node.contribution:.5f}",
            f"{row.contribution:.5f}",
            f"{row.effect:+.5f}",
        )
    out.print(table)


def _place(row: Verified) -> list[object]:
    return [getattr(row.node, name) for name in COLUMNS]


def _write_table(path: Path, found: Agreement) -> None:
    """Best estimate first: the node, both estimates, both exact values."""
    header = (*COLUMNS, "contribution", "effect", "exact_contribution", "exact_effect")
    rows = (
        [*_place(row), row.node.contribution, row.node.effect, row.contribution, row.effect]
        for row in found.rows
    )
    write_csv(path, header, rows)
