"""atp-fast doctor: what is installed, what works, and whether a model is served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from atp_fast.cli.commands import note


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Also say whether this model is served: hub id, folder or smollm2-135m."),
    ] = None,
) -> None:
    """Print versions, build, backends and, for a model, whether it is served.

    For a model that is refused the reason is printed, and the exit code is 1.
    Paste the output into a bug report.
    """
    from atp_fast.ops.build import build_info

    _print_table(build_info())
    if model is not None:
        note(f"loading {model}")
        _print_model(model)


def _print_model(name: str) -> None:
    from atp_fast.engine import Engine
    from atp_fast.models import load_model

    try:
        network, _ = load_model(name)
    except NotImplementedError as error:
        _refuse(name, str(error))
    try:
        found = Engine(network).plug.inspection
    except (NotImplementedError, ValueError) as error:
        _refuse(name, str(error))
    facts = {
        "layers": found.layers,
        "query heads": found.heads,
        "key/value heads": found.kv_heads,
        "neurons per layer": _in_layers(found.counts.get("neuron", (found.neurons,))),
        "context": found.context or "no limit",
    }
    typer.echo(f"\n{name}: served ({found.model})")
    _print_table({key: str(value) for key, value in facts.items()})
    for kind, reason in found.refused.items():
        typer.echo(f"without {kind}: {reason}")


def _in_layers(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])


def _refuse(name: str, reason: str) -> None:
    typer.echo(f"\n{name}: refused: {reason}")
    raise typer.Exit(1)


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for key, value in rows.items():
        typer.echo(f"{key:<{width}}  {value}")
