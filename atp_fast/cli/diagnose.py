"""atp-fast diagnose: how large the effect of a node that was not verified could still be."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from atp_fast.cli import options
from atp_fast.cli.opened import open_run
from atp_fast.cli.show import console, print_written
from atp_fast.cli.verify import EXACT
from atp_fast.files import write_text
from atp_fast.nodes import label

BOUND = "bound.json"


def diagnose(
    run: options.Run,
    forwards: Annotated[
        int, typer.Option(min=1, help="Random subsets to patch, one forward each.")
    ] = 1000,
    probability: Annotated[
        float, typer.Option(help="Chance of each unverified node to be in a subset.")
    ] = 0.03,
    confidence: Annotated[
        str, typer.Option(help="Confidence levels, with commas.")
    ] = "0.9,0.99,0.999",
    nodes: options.RunNodes = None,
    seed: Annotated[int, typer.Option(help="Seed of the subsets.")] = 0,
    model: options.MovedModel = None,
    backend: options.Backend = "auto",
) -> None:
    """Bound the largest effect among the nodes that were not verified, after `atp-fast verify` of the same run.

    Random subsets of them are patched at once; a one-sided Welch test on
    every node gives the bound, and its assumptions are printed with it.
    """
    from atp_fast.results import PatchEffects

    if not (run / EXACT).is_file() and run.is_dir():
        raise FileNotFoundError(f"{run} holds no {EXACT}: run `atp-fast verify {run}` first")
    levels = _levels(confidence)
    opened = open_run(run, model, backend)
    verified = PatchEffects.load(run / EXACT).nodes or []
    kinds = opened.found.space.kinds if nodes is None else options.names(nodes)
    bound = opened.engine.bound_missed(
        opened.pairs,
        exclude=verified,
        metric=opened.found.metric,
        direction=opened.direction,
        nodes=kinds,
        confidence=levels,
        forwards=forwards,
        probability=probability,
        seed=seed,
    )
    out = console()
    out.print(
        f"{len(bound.nodes):,} unverified nodes ({', '.join(kinds)}), {bound.forwards:,} random subsets:",
        markup=False,
    )
    for level, value in zip(bound.confidence, bound.bounds, strict=True):
        node = label(bound.worst(1, level)[0], opened.found.tokens)
        out.print(
            f"with {100 * level:g} % confidence none has |effect| >= {value:.5f} (largest: {node})",
            markup=False,
        )
    out.print(bound.assumptions, markup=False)
    question = {
        "metric": opened.found.metric,
        "direction": opened.direction,
        "pairs_digest": opened.pairs.digest(),
        "kinds": list(kinds),
    }
    write_text(run / BOUND, json.dumps(question | bound.to_dict(), indent=2) + "\n")
    print_written([run / BOUND])


def _levels(text: str) -> list[float]:
    try:
        return [float(level) for level in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"confidence must be numbers with commas, such as 0.9,0.99, got {text!r}"
        ) from error
