"""atp-fast doctor: what is installed, what works, whether a model is served, and what its pairs will take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from atp_fast.attribution.question import Question
from atp_fast.cli import options
from atp_fast.cli.commands import note

if TYPE_CHECKING:
    from atp_fast.engine import Engine
    from atp_fast.estimates import Estimate
    from atp_fast.prompts import PromptPairs
    from atp_fast.prompts.encoding import Tokenizer


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Also say whether this model is served: hub id, folder or smollm2-135m."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Also say what attributing these pairs will take: a .jsonl, or EAP-IG's .csv."
        ),
    ] = None,
    verify: Annotated[
        int, typer.Option(min=1, help="And what verifying so many nodes of them will take.")
    ] = 100,
    metric: options.Metric = options.DEFAULT_METRIC,
    method: options.Method = Question.method,
    nodes: options.Nodes = options.DEFAULT_NODES,
    backend: options.Backend = "auto",
    dtype: options.Dtype = None,
    precision: options.Precision = None,
    memory_budget: options.MemoryBudget = None,
) -> None:
    """Print versions, build, backends and, for a model, whether it is served.

    For a model that is refused the reason is printed, and the exit code is 1.
    Paste the output into a bug report. With --pairs, the seconds and the
    memory that they will take, beside the model: one layer of each kind is
    tried, on this machine as it is now.
    """
    from atp_fast.ops.build import build_info

    if pairs is not None and model is None:
        raise ValueError(f"--pairs needs --model, got {str(pairs)!r} alone")
    _print_table(build_info())
    if model is not None:
        note(f"loading {model}")
        engine, tokenizer = _open(model, backend, dtype, precision, memory_budget)
        _print_model(model, engine)
        if pairs is not None:
            from atp_fast.cli.attribute import read_file

            given = read_file(pairs, tokenizer)
            kinds = options.names(nodes)
            _print_estimate(method, engine.estimate(given, metric, method, kinds))
            _print_estimate(
                f"verify {verify} nodes", _of_patching(engine, given, metric, kinds, verify)
            )


def _open(
    name: str, backend: str, dtype: str | None, precision: str | None, memory_budget: str | None
) -> tuple[Engine, Tokenizer]:
    from atp_fast.engine import Engine
    from atp_fast.models import load_model

    try:
        network, tokenizer = load_model(name, dtype=dtype)
    except NotImplementedError as error:
        _refuse(name, str(error))
    try:
        return Engine(network, backend, precision, memory_budget), tokenizer
    except (NotImplementedError, ValueError) as error:
        _refuse(name, str(error))


def _of_patching(
    engine: Engine, pairs: PromptPairs, metric: str, kinds: Sequence[str], count: int
) -> Estimate:
    """Of so many nodes that can have an effect, evenly spread."""
    from atp_fast.patching.subsets import moving_ids

    space = engine.plug.space(pairs.width, kinds)
    candidates = moving_ids(space, pairs)
    step = max(1, len(candidates) // count)
    return engine.estimate_patch(
        pairs, [space.node(int(flat)) for flat in candidates[::step][:count]], metric
    )


def _print_estimate(what: str, found: Estimate) -> None:
    typer.echo(f"\n{what}: {found.seconds:.3g} s, in {found.batches} batches")
    rows = {
        device: f"{_size(bytes.peak)} at the peak: model {_size(bytes.model)}, result {_size(bytes.result)}, "
        f"work {_size(bytes.work)}"
        for device, bytes in found.devices.items()
    }
    _print_table(rows)


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _print_model(name: str, engine: Engine) -> None:
    found = engine.plug.inspection
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


def _refuse(name: str, reason: str) -> NoReturn:
    typer.echo(f"\n{name}: refused: {reason}")
    raise typer.Exit(1)


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for key, value in rows.items():
        typer.echo(f"{key:<{width}}  {value}")
