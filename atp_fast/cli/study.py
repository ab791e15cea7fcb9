"""atp-fast study: AtP, AtP* and the baselines against the exact effects of every node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from atp_fast.attribution.question import PAPER_METRIC, Question
from atp_fast.cli import options
from atp_fast.cli.commands import note
from atp_fast.cli.folder import writable_folder
from atp_fast.cli.show import print_written


def study(
    model: options.Model,
    tasks: Annotated[
        str,
        typer.Option(help=f"Tasks, with commas, each with :n for n pairs: {options.TASK_NAMES}."),
    ] = "city,ioi_pair",
    families: Annotated[
        str, typer.Option(help="attention (all q, k, v, z nodes), neuron, or both with a comma.")
    ] = "attention",
    metric: options.Metric = PAPER_METRIC,
    direction: options.Direction = Question.direction,
    seeds: Annotated[int, typer.Option(help="Runs of each baseline.")] = 5,
    top: Annotated[int, typer.Option(help="The largest K of the curves.")] = 1000,
    limit: Annotated[
        int | None,
        typer.Option(help="Most forwards that one run of a baseline may measure; no limit if 0."),
    ] = None,
    neurons: Annotated[
        int, typer.Option(help="Neuron nodes: a random sample of this size, and as many of ...")
    ] = 2000,
    neurons_top: Annotated[
        int, typer.Option(help="... the best neuron nodes of each estimator.")
    ] = 2000,
    verified: Annotated[
        int, typer.Option(help="Nodes taken as verified for the bound on what is missed.")
    ] = 100,
    forwards: Annotated[int, typer.Option(help="Random subsets for that bound.")] = 2000,
    probability: Annotated[
        float, typer.Option(help="Chance of each node to be in such a subset.")
    ] = 0.01,
    backend: options.Backend = "auto",
    dtype: options.Dtype = None,
    out: Annotated[
        Path,
        typer.Option(help="Folder for tables, curves and finished pieces; a second run goes on."),
    ] = Path("runs/study"),
) -> None:
    """Compare AtP, its variants and the paper's baselines with exact patching of every node.

    Writes results.csv, settings.csv, curves.csv, bounds.csv, summary.md,
    curves.html and curves.png. Finished pieces are kept: a run that was
    stopped goes on where it was.
    """
    from atp_fast.engine import Engine
    from atp_fast.models import load_model
    from atp_fast.prompts.directions import Direction
    from atp_fast.prompts.tasks import load_task
    from atp_fast.study import Plan, run_study, write_study
    from atp_fast.study.cases import engine_cases

    plan = Plan(
        seeds=seeds,
        top=top,
        limit=limit or None,
        verified=verified,
        forwards=forwards,
        probability=probability,
    )
    wanted = [_task(text) for text in tasks.split(",")]
    writable_folder(out)
    note(f"loading {model}")
    network, tokenizer = load_model(model, dtype=dtype)
    pairs = {name: load_task(name, tokenizer, n_pairs=count) for name, count in wanted}
    cases = engine_cases(
        Engine(network, backend),
        pairs,
        options.names(families),
        metric=metric,
        direction=cast(Direction, direction),
        sample=neurons,
        best=neurons_top,
    )
    found = run_study(cases, out, plan)
    print_written(write_study(found, out, f"Method study on {model}"))


def _task(text: str) -> tuple[str, int | None]:
    """Name and number of pairs of "ioi:12"; None where no number is given."""
    name, colon, count = text.strip().partition(":")
    if colon and not (count.isdigit() and int(count)):
        raise ValueError(f"tasks must be names, or names with :n for n pairs, got {text!r}")
    return name, int(count) if colon else None
