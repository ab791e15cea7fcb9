"""Printing nodes and their scores as a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from atp_fast.prompts.pairs import PromptPairs
    from atp_fast.results import Attribution, ScoredNode

_PIPE_WIDTH = 120


def console() -> Console:
    """stdout; a pipe gets a width of its own, since it has none."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def print_top(found: Attribution, nodes: Sequence[ScoredNode]) -> None:
    """The run in a line or two, then one row per node."""
    out = console()
    clean, corrupted = found.metric_means
    pairs = len(found.clean_value)
    out.print(
        f"{found.method} on {found.model}, {pairs} pair{'s' * (pairs != 1)}, {found.direction}, "
        f"backend {found.backend}: {found.metric} {clean:.4f} clean, {corrupted:.4f} corrupted",
        markup=False,
    )
    table = Table(title=f"Top {len(nodes)} nodes by contribution")
    table.add_column("#", justify="right")
    table.add_column("kind")
    table.add_column("layer", justify="right")
    table.add_column("position", justify="right")
    table.add_column("token")
    table.add_column("index", justify="right")
    table.add_column("contribution", justify="right")
    table.add_column("effect", justify="right")
    for rank, node in enumerate(nodes, start=1):
        table.add_row(
            str(rank),
            node.kind,
            str(node.layer),
            str(node.position),
            _token(node.token),
            str(node.index),
            f"{node.contribution:.5f}",
            f"{node.effect:+.5f}",
        )
    out.print(table)


def _token(token: str | None) -> str:
    """A token as text in which spaces and line ends show."""
    return "" if token is None else escape(repr(token)[1:-1].replace(" ", "␣"))


def print_pair(pairs: PromptPairs, answer: str) -> None:
    """The first pair, as text."""
    assert pairs.tokens is not None
    assert pairs.corrupted_tokens is not None
    typer.echo(f"clean      {''.join(pairs.tokens[0])!r} -> {answer!r}")
    typer.echo(f"corrupted  {''.join(pairs.corrupted_tokens[0])!r}")


def print_written(files: Sequence[Path]) -> None:
    for path in files:
        typer.echo(f"wrote {path}")
